"""Runs one method of llm-compressor for bench.blocks_cpu, in the peer's own environment. It imports none of our code.

PYTHON bench/peer_llmcompressor.py MODEL METHOD CALIBRATION.npy OUT
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch


def modifier(name: str) -> Any:
    """The peer's recipe for one of our methods."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
    from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    linears: dict[str, Any] = {"targets": ["Linear"], "ignore": ["lm_head"]}
    if name.startswith("smoothquant"):
        return [SmoothQuantModifier(smoothing_strength=0.5), QuantizationModifier(scheme="W8A8", **linears)]
    if name.startswith("gptq") or name == "nearest":
        symmetric = "asymmetric" not in name
        weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": 64}
        kind = QuantizationModifier if name == "nearest" else GPTQModifier
        return kind(config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])
    mask = {"mask_structure": "2:4"} if name.endswith("2:4") else {}
    pruning = SparseGPTModifier if name.startswith("sparsegpt") else WandaPruningModifier
    return pruning(sparsity=0.5, **linears, **mask)


def main() -> None:
    source, name, calibration, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4]
    from llmcompressor import oneshot
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    ids = torch.from_numpy(np.load(calibration))
    rows: Any = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(source / "tokenizer.json"), pad_token="<|endoftext|>")
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=DataLoader(rows, batch_size=4),
        recipe=modifier(name),
        max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids),
        pipeline="sequential",
    )
    model.save_pretrained(out, save_compressed=not name.startswith(("sparsegpt", "wanda")))


if __name__ == "__main__":
    main()
