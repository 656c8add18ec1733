"""Writes checkpoints of codes as other libraries write them, and opens them here."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nightpress.core.compress.executors.open_source import open_source

WEIGHT = "model.layers.0.mlp.up_proj.weight"
MODULE = WEIGHT.removesuffix(".weight")
#: Tensors of a checkpoint that are not quantized.
BESIDE = {
    "model.norm.weight": torch.linspace(0.5, 1.5, 7),
    "model.layers.0.mlp.up_proj.bias": torch.arange(3).to(torch.bfloat16),
}


def write_checkpoint(
    folder: Path, tensors: Mapping[str, Tensor], quantization: Mapping[str, Any] | None, *, dtype: str = "bfloat16"
) -> Path:
    folder.mkdir()
    config: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": dtype}
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    save_file({**BESIDE, **tensors}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def opened(folder: Path) -> dict[str, Tensor]:
    """The tensors of the float model that the checkpoint stands for. What is not quantized must be as it was."""
    target = folder.with_name(f"{folder.name}-opened")
    open_source(folder, target, lambda _fraction, _what: None)
    assert "quantization_config" not in json.loads((target / "config.json").read_text())
    found = load_file(target / "model.safetensors")
    for name, tensor in BESIDE.items():
        assert torch.equal(found.pop(name), tensor)
    return found


def pack_gptq(codes: Tensor, bits: int) -> Tensor:
    """AutoGPTQ's layout: codes [in, out] from 0 → int32 [in · bits / 32, out], bit by bit, as its loops write them."""
    rows, columns = codes.shape
    words = torch.zeros(rows * bits // 32, columns, dtype=torch.int64)
    for row in range(rows):
        for bit in range(bits):
            at = row * bits + bit
            words[at // 32] |= ((codes[row].long() >> bit) & 1) << (at % 32)
    return words.where(words < 2**31, words - 2**32).int()


def pack_awq(codes: Tensor) -> Tensor:
    """AutoAWQ's layout `gemm`: codes [rows, out] from 0 to 15 → int32 [rows, out / 8]."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    words = torch.zeros(len(codes), codes.shape[1] // 8, dtype=torch.int64)
    for place, element in enumerate(order):
        words |= codes[:, element::8].long() << (4 * place)
    return words.where(words < 2**31, words - 2**32).int()
