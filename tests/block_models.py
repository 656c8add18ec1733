"""Small random models of every family for tests of the blocks executor, what to press them with, and a method that only scales."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor

from nightpress.core.compress.calibration.samples import model_inputs
from nightpress.core.compress.context import PassContext
from nightpress.core.compress.executors.blocks import FinalTensor, Inputs
from nightpress.core.compress.executors.live_block import LiveBlock
from nightpress.core.compress.model.checkpoint import read_shards
from nightpress.core.compress.passes.folding import Folding
from nightpress.core.compress.solvers.wanda import Power
from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.linears import is_linear_weight
from nightpress.core.recipes.passes import Wanda

_SMALL = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "intermediate_size": 64,
    "vocab_size": 97,
}
_GROUPED = {**_SMALL, "num_key_value_heads": 2, "max_position_embeddings": 64}
_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {**_GROUPED, **_IDS},
    "MistralForCausalLM": {**_GROUPED, **_IDS, "sliding_window": 8},
    "Qwen2ForCausalLM": {**_GROUPED, **_IDS, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "Qwen3ForCausalLM": {**_GROUPED, **_IDS, "head_dim": 8},
    "GemmaForCausalLM": {**_GROUPED, **_IDS, "head_dim": 8},
    "Gemma2ForCausalLM": {**_GROUPED, **_IDS, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "PhiForCausalLM": {**_GROUPED, **_IDS},
    "Phi3ForCausalLM": {**_GROUPED, **_IDS},
    "GPTNeoXForCausalLM": {**_SMALL, **_IDS},
    "OPTForCausalLM": {**_SMALL, **_IDS, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "GPT2LMHeadModel": {**_IDS, "n_embd": 32, "n_head": 4, "n_layer": 3, "vocab_size": 97, "n_positions": 64},
    "Gemma3ForCausalLM": {**_GROUPED, **_IDS, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "FalconForCausalLM": {**_SMALL, **_IDS},
    "Starcoder2ForCausalLM": {**_GROUPED, **_IDS},
    "GPTBigCodeForCausalLM": {**_IDS, "n_embd": 32, "n_head": 4, "n_layer": 3, "vocab_size": 97, "n_positions": 64},
    "MixtralForCausalLM": {**_GROUPED, **_IDS, "num_local_experts": 4},
    "Qwen2MoeForCausalLM": {
        **_GROUPED,
        **_IDS,
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "mlp_only_layers": [1],
    },
    "OlmoeForCausalLM": {**_GROUPED, **_IDS, "num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 0.5},
    "Qwen3MoeForCausalLM": {
        **_GROUPED,
        **_IDS,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "head_dim": 8,
    },
    "T5ForConditionalGeneration": {
        "d_model": 32,
        "d_kv": 8,
        "num_heads": 4,
        "num_layers": 3,
        "d_ff": 64,
        "vocab_size": 97,
        "decoder_start_token_id": 0,
    },
    "ViTForImageClassification": {
        **{key: value for key, value in _SMALL.items() if key != "vocab_size"},
        "image_size": 32,
        "patch_size": 8,
    },
    "AlbertForMaskedLM": {**_SMALL, "embedding_size": 16},
    "BertForMaskedLM": _SMALL,
    "RobertaForSequenceClassification": {**_SMALL, "max_position_embeddings": 66},
    "DistilBertForMaskedLM": {"dim": 32, "n_heads": 4, "n_layers": 3, "hidden_dim": 64, "vocab_size": 97},
    "MPNetForMaskedLM": {**_SMALL, "max_position_embeddings": 66},
    "ElectraForMaskedLM": {**_SMALL, "embedding_size": 16},
    "ModernBertForMaskedLM": {**_SMALL, **_IDS, "cls_token_id": 3, "sep_token_id": 4, "local_attention": 8},
    "DebertaV2ForMaskedLM": {
        **_SMALL,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8,
    },
}


def settings_of(class_name: str, layers: int) -> dict[str, Any]:
    """The settings in FAMILIES, for a model with so many layers."""
    settings = FAMILIES[class_name]
    (name,) = settings.keys() & {"num_hidden_layers", "num_layers", "n_layers", "n_layer"}
    return {**settings, name: layers}


def save_model(class_name: str, folder: Path, *, layers: int | None = None) -> Any:
    model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    settings = FAMILIES[class_name] if layers is None else settings_of(class_name, layers)
    model = model_class(model_class.config_class(**settings)).eval()
    for parameter in model.parameters():  # random norms and biases: the initial ones and zeros would hide errors
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


def token_ids(samples: int = 5, length: int = 24) -> Tensor:
    return torch.randint(5, 97, (samples, length), generator=torch.Generator().manual_seed(1))


def samples_of(family: str, ids: Tensor) -> dict[str, Tensor]:
    """The inputs of the family's models."""
    if family.startswith("ViT"):
        return {"pixel_values": torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))}
    header = ModelHeader(model_type="x", architecture=family, config={}, tensors=(), has_tokenizer=False)
    return model_inputs(ids, header)


def context_of(source: Path, work: Path, dtype: Literal["auto", "float32"] = "float32", **extra: Any) -> PassContext:
    """A context. By default it computes in float32, so that results can be compared with the whole model in float32."""
    header = ModelHeader(model_type="x", architecture="x", config={}, tensors=(), has_tokenizer=False)
    if (source / "tokenizer.json").exists():
        header = inspect_model(FolderFiles(source))
    return PassContext(header=header, work_dir=work, calibration=Calibration(dtype=dtype), **extra)


def linears_of(source: Path) -> frozenset[str]:
    infos = [tensor.info for shard in read_shards(source) for tensor in shard.tensors]
    return frozenset(info.name for info in infos if is_linear_weight(info, Wanda().ignore))


class Scaled:
    """A method that leaves weights in float, but exchanges random factors between the layers of every fold."""

    by_group = False

    def __init__(self, header: ModelHeader) -> None:
        self._folding = Folding(header)
        self.scaled: set[str] = set()

    def watch(self, columns: int, device: torch.device) -> Power:
        return Power(columns, device)

    def settle(self, block: LiveBlock, inputs: Sequence[Inputs], device: torch.device) -> dict[str, FinalTensor]:
        seen = {name: group for group in inputs for name in group.names}
        floats = {name: block[name].to(device).float() for name in seen}
        for place in self._folding.places(block, seen):
            columns = block[place.targets[0]].shape[1]
            factors = torch.rand(columns, generator=torch.Generator().manual_seed(columns)) * 8 + 0.125
            if place.kind == "values":
                heads, width = place.share
                grouped = factors.view(heads, -1, width)
                factors = grouped[:, :1].expand_as(grouped).reshape(-1)
            place.apply(factors, block, floats)
            self.scaled |= {*place.targets, *place.routers}
        return {
            name: FinalTensor(weight=weight, tensors={name: weight}, effect=None) for name, weight in floats.items()
        }

    def restore(self, name: str, written: Mapping[str, Tensor]) -> Tensor:
        return written[name]
