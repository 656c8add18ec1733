"""Reads a GGUF file of a Llama, Mistral, Qwen 2 or Qwen 3 back into floats under transformers' names, some rows of a tensor at a time."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from nightpress.core.compress.model.checkpoint import ShardWriter, tensor_info, write_index, write_json
from nightpress.core.compress.model.modules import quiet
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.header import TensorInfo

#: llama.cpp's `general.architecture` → transformers' model_type and class
_FAMILIES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_BLOCKS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_PLAIN = {gguf.GGMLQuantizationType.F32: "F32", gguf.GGMLQuantizationType.F16: "F16"}
_CHUNK = 8 * 1024**2  #: numbers that are decoded at a time


class GgufSource:
    """A GGUF file, mapped. Raises NightpressError(unsupported_format) for what is not read exactly."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._reader = gguf.GGUFReader(path, "r")
        except (ValueError, OSError, IndexError, KeyError) as error:
            raise NightpressError(
                ErrorCode.MALFORMED_MODEL,
                f"{path.name} can't be read: {error}.",
                hint="Fetch it again.",
                file=path.name,
            ) from error
        self._architecture = str(self._field("general.architecture"))
        if self._architecture not in _FAMILIES:
            raise self._refused(f"its architecture is {self._architecture[:40]!r}; {', '.join(_FAMILIES)} are read")

    def config(self) -> dict[str, Any]:
        """The config.json of the model."""
        kind, architecture = _FAMILIES[self._architecture]
        heads = int(self._of_model("attention.head_count"))
        width = int(self._of_model("embedding_length"))
        config: dict[str, Any] = {
            "model_type": kind,
            "architectures": [architecture],
            "hidden_size": width,
            "intermediate_size": int(self._of_model("feed_forward_length")),
            "num_hidden_layers": int(self._of_model("block_count")),
            "num_attention_heads": heads,
            "num_key_value_heads": int(self._of_model("attention.head_count_kv", heads)),
            "head_dim": int(self._of_model("attention.key_length", width // heads)),
            "max_position_embeddings": int(self._of_model("context_length")),
            "rms_norm_eps": float(self._of_model("attention.layer_norm_rms_epsilon")),
            "rope_theta": float(self._of_model("rope.freq_base", 10000.0)),
            "vocab_size": int(self._tensors()["token_embd.weight"].shape[1]),
            "tie_word_embeddings": "output.weight" not in self._tensors(),
            "attention_bias": "blk.0.attn_q.bias" in self._tensors() and kind != "qwen2",
            "dtype": "float16",
        }
        for key in ("bos_token_id", "eos_token_id"):
            if (value := self._field(f"tokenizer.ggml.{key}", None)) is not None:
                config[key] = int(value)
        return config

    def write(self, target: Path) -> None:
        """Write the weights to `target` as model.safetensors, and config.json. Codes become float16; floats stay as they are."""
        config = self.config()
        names = {name: self._name(name) for name in self._tensors()}
        infos = [self._info(name, names[name]) for name in names]
        with ShardWriter(target / "model.safetensors", infos) as writer:
            for info, tensor in zip(infos, self._tensors().values(), strict=True):
                order = self._order(info.name, config)
                rows = int(np.prod(info.shape[:-1]))
                stored = tensor.data.reshape(rows, -1)
                step = max(_CHUNK // max(info.shape[-1], 1), 1)
                width = info.size // max(rows, 1)
                for first in range(0, rows, step):
                    chosen = np.arange(first, min(first + step, rows))
                    chosen = chosen if order is None else order[chosen]
                    writer.write(info.name, first * width, self._decoded(stored[chosen], tensor, info.dtype))
            writer.commit()
        write_index(target)
        write_json(target / "config.json", config)

    def _decoded(self, stored: NDArray[Any], tensor: Any, dtype: str) -> memoryview:
        floats = gguf.quants.dequantize(stored, tensor.tensor_type)
        kept = floats.astype(np.float16 if dtype == "F16" else np.float32)
        return memoryview(np.ascontiguousarray(kept).reshape(-1).view(np.uint8))  # type: ignore[arg-type]  # an array is a buffer

    def _info(self, name: str, known: str) -> TensorInfo:
        tensor = self._tensors()[name]
        shape = tuple(int(size) for size in reversed(tensor.shape))
        return tensor_info(known, _PLAIN.get(tensor.tensor_type, "F16"), shape)

    def _name(self, name: str) -> str:
        stem, _, leaf = name.rpartition(".")
        if stem in _TOP:
            return f"{_TOP[stem]}.{leaf}"
        _, number, part = stem.split(".", 2) if stem.startswith("blk.") and stem.count(".") == 2 else ("", "", "")
        if part not in _IN_BLOCKS:
            raise self._refused(f"transformers computes {name[:80]} otherwise, or has no such tensor")
        return f"model.layers.{number}.{_IN_BLOCKS[part]}.{leaf}"

    def _order(self, name: str, config: dict[str, Any]) -> NDArray[np.intp] | None:
        """The file's row for each row of the model; None: the same. llama.cpp has a Llama's rotated pairs side by side."""
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if self._architecture != "llama" or heads is None:
            return None
        rows = np.arange(config[heads] * config["head_dim"])
        order: NDArray[np.intp] = rows.reshape(config[heads], -1, 2).swapaxes(1, 2).reshape(-1)
        return order

    def _tensors(self) -> dict[str, Any]:
        return {tensor.name: tensor for tensor in self._reader.tensors}

    def _of_model(self, key: str, *default: Any) -> Any:
        return self._field(f"{self._architecture}.{key}", *default)

    def _field(self, key: str, *default: Any) -> Any:
        field = self._reader.get_field(key)
        if field is not None:
            return field.contents()
        if default:
            return default[0]
        raise self._refused(f"it does not say {key}")

    def _refused(self, why: str) -> NightpressError:
        return NightpressError(
            ErrorCode.UNSUPPORTED_FORMAT,
            f"{self._path.name} can't be read back exactly: {why}.",
            hint="Bring the model that it was made from.",
            file=self._path.name,
        )


def convert_gguf(path: Path, target: Path) -> None:
    """Write the model of a GGUF file to `target`, with the tokenizer that is in it. Raises NightpressError(unsupported_format, malformed_model)."""
    import transformers

    GgufSource(path).write(target)
    with quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        tokenizer.save_pretrained(target)
