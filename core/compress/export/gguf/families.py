"""llama.cpp's names for a family's tensors, and the metadata about the model's shape that a GGUF file needs.

Names and keys are llama.cpp's. The package `gguf` maps the tensors' names. A family is listed here only if llama.cpp computes what
transformers computes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from nightpress.core.recipes.header import ModelHeader

_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,  # llama.cpp has the same graph for both
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma": gguf.MODEL_ARCH.GEMMA,
    "bert": gguf.MODEL_ARCH.BERT,
}
_POOLING = {"mean": gguf.PoolingType.MEAN, "cls": gguf.PoolingType.CLS, "lasttoken": gguf.PoolingType.LAST}
#: Prefixes of a BERT's tensors that an embedding does not need.
_UNUSED = ("pooler.", "cls.", "embeddings.position_ids")


@dataclass(frozen=True)
class GgufFamily:
    """A model's names, shapes and metadata in GGUF."""

    header: ModelHeader

    @property
    def architecture(self) -> str:
        return gguf.MODEL_ARCH_NAMES[_ARCHITECTURES[self.header.model_type]]

    @property
    def _config(self) -> Mapping[str, Any]:
        return self.header.config

    @property
    def _heads(self) -> int:
        return int(self._config["num_attention_heads"])

    @property
    def _key_value_heads(self) -> int:
        return int(self._config.get("num_key_value_heads") or self._heads)

    @property
    def _head_width(self) -> int:
        return int(self._config.get("head_dim") or self._config["hidden_size"] // self._heads)

    def name(self, tensor: str) -> str | None:
        """Return a tensor's name in the file, or None if llama.cpp does not use it. Raises KeyError for an unknown tensor."""
        plain = tensor.removeprefix("bert.")
        if self.header.model_type == "bert" and plain.startswith(_UNUSED):
            return None
        if tensor.endswith("rotary_emb.inv_freq"):
            return None
        plain = plain.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        names = gguf.get_tensor_name_map(_ARCHITECTURES[self.header.model_type], int(self._config["num_hidden_layers"]))
        found = names.get_name(plain, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise KeyError(tensor)
        return found

    @property
    def tied(self) -> bool:
        """Whether config.json says that the output head is the embedding table."""
        return bool(self._config.get("tie_word_embeddings", self.header.model_type == "gemma"))

    @property
    def has_own_head(self) -> bool:
        """Whether llama.cpp's graph can have an output head besides the embedding table."""
        return self.header.model_type != "gemma"

    def row_order(self, tensor: str) -> NDArray[np.intp] | None:
        """Return the order of a tensor's rows in the file; None: unchanged.

        Rotary embeddings rotate pairs of a Llama's query and key rows. In the file, a pair is two neighbouring rows of a head. In
        transformers, it is a row of the head's first half and the same row of its second half.
        """
        if self.architecture != "llama" or ".self_attn." not in tensor:
            return None
        heads = {"q_proj": self._heads, "k_proj": self._key_value_heads}.get(tensor.split(".")[-2])
        if heads is None:
            return None
        rows = np.arange(heads * self._head_width)
        return rows.reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)

    def change(self, tensor: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Add 1 to the weights of a Gemma's norms: these norms multiply by 1 + weight, and the file stores this sum."""
        return values + 1 if self.header.model_type == "gemma" and tensor.endswith("norm.weight") else values

    def extra_tensors(self) -> dict[str, NDArray[np.float32]]:
        """Tensors that llama.cpp reads from the file but transformers computes from the config: Llama 3's rotary frequency factors."""
        rope = self._rope
        if rope.get("rope_type", rope.get("type")) != "llama3":
            return {}
        return {"rope_freqs.weight": _llama3_factors(rope, self._theta, self._head_width)}

    def describe(self, writer: gguf.GGUFWriter, *, pooling: str) -> None:
        """Write the model's shape into the file's metadata."""
        config = self._config
        writer.add_block_count(int(config["num_hidden_layers"]))
        writer.add_context_length(int(config.get("max_position_embeddings") or 2048))
        writer.add_embedding_length(int(config["hidden_size"]))
        writer.add_feed_forward_length(int(config["intermediate_size"]))
        writer.add_head_count(self._heads)
        writer.add_vocab_size(int(config["vocab_size"]))
        if self.header.model_type == "bert":
            writer.add_layer_norm_eps(float(config.get("layer_norm_eps", 1e-12)))
            writer.add_causal_attention(False)
            writer.add_token_type_count(int(config.get("type_vocab_size") or 1))
            writer.add_pooling_type(_POOLING[pooling])
            return
        writer.add_head_count_kv(self._key_value_heads)
        writer.add_layer_norm_rms_eps(float(config.get("rms_norm_eps", 1e-6)))
        writer.add_rope_dimension_count(self._head_width)
        writer.add_rope_freq_base(self._theta)
        writer.add_key_length(self._head_width)
        writer.add_value_length(self._head_width)
        if self._rope.get("rope_type", self._rope.get("type")) == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(float(self._rope["factor"]))

    @property
    def _rope(self) -> Mapping[str, Any]:
        return self._config.get("rope_parameters") or self._config.get("rope_scaling") or {}

    @property
    def _theta(self) -> float:
        return float(self._rope.get("rope_theta") or self._config.get("rope_theta") or 10000.0)


def _llama3_factors(rope: Mapping[str, Any], theta: float, width: int) -> NDArray[np.float32]:
    """The divisor of each rotary frequency [width / 2]: `factor` for long waves, 1 for short waves, interpolated in between."""
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = float(rope["original_max_position_embeddings"])
    frequencies = theta ** -(np.arange(0, width, 2, dtype=np.float64) / width)
    turns = original * frequencies / (2 * math.pi)  # rotations over the original context length
    share = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / (share + (1 - share) / factor)).astype(np.float32)
