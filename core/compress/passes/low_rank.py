"""Low-rank changes of linear layers, trained instead of the weights (LoRA, arXiv 2106.09685).

At the end they are merged into the weights. Those of fixed codes are written as an adapter of PEFT instead.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nightpress.core.compress.model.checkpoint import disk_errors, sync_folder, write_json
from nightpress.core.compress.model.networks import find_blocks
from nightpress.core.compress.passes.scaled_linear import ScaledLinear
from nightpress.core.recipes.passes.lessons import Lora


class LowRank(nn.Module):
    """A linear layer whose weight is W + scale · B A: W [out, in] is frozen, A [rank, in] and B [out, rank] learn. B starts at zero."""

    def __init__(self, linear: nn.Linear | ScaledLinear, rank: int, scale: float) -> None:
        super().__init__()
        self.linear, self.scale = linear, scale
        self.a = nn.Parameter(torch.empty(rank, linear.in_features))
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x) + self.scale * nn.functional.linear(nn.functional.linear(x, self.a), self.b)
        return out


def add_low_rank(model: Any, options: Lora, *, seed: int) -> dict[str, LowRank]:
    """Add a low-rank change to every linear layer of the blocks. Return the changes by the layers' names.

    All other parameters of the blocks and the embeddings are frozen. The rest of the model learns, such as a classifier's head.
    """
    path, _ = find_blocks(model)
    ranks = {
        name: min(options.rank, *module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(path + ".")
    }
    added = add_changes(model, ranks, options.alpha / options.rank, seed=seed)
    for name, parameter in model.named_parameters():  # a classifier's head is small, and must adapt to the blocks
        if not name.startswith(path + ".") and "embed" not in name:
            parameter.requires_grad_(True)
    return added


def merge_low_rank(model: Any, added: dict[str, LowRank]) -> None:
    """Add each change to its layer's weight, and put the plain layers back."""
    with torch.no_grad():
        for name, low_rank in added.items():
            assert isinstance(low_rank.linear, nn.Linear)
            low_rank.linear.weight += low_rank.scale * (low_rank.b @ low_rank.a)
            _put(model, name, low_rank.linear)


def add_changes(model: Any, ranks: Mapping[str, int], scale: float, *, seed: int) -> dict[str, LowRank]:
    """Add a low-rank change to each of these layers. ranks: by name. Returns the changes by name. Nothing else of the model learns."""
    model.requires_grad_(False)
    added = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, rank in ranks.items():
            added[name] = LowRank(model.get_submodule(name), rank, scale)
            _put(model, name, added[name])
    return added


def write_adapter(folder: Path, added: Mapping[str, LowRank], rank: int, alpha: float) -> None:
    """Write the changes as an adapter that PEFT and vLLM load, in float32."""
    targets = sorted({name.rsplit(".", 1)[-1] for name in added})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": targets,
        "base_model_name_or_path": None,
        "inference_mode": True,
    }
    tensors = {}
    for name, low_rank in added.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = low_rank.a.detach().cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = low_rank.b.detach().cpu().contiguous()
    with disk_errors():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "adapter_config.json", config)
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        sync_folder(folder)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    above, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(above), leaf, module)
