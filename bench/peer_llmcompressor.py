"""One method of llm-compressor for bench.blocks_cpu, run by the interpreter of its own environment: no code of ours is imported.

PYTHON bench/peer_llmcompressor.py FOLDER NAME CALIBRATION.npy
"""

import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch


def perplexity(model: Any, file: Path) -> float:
    """Over the windows of token ids in an .npy file."""
    ids = torch.from_numpy(np.load(file))
    total, count = 0.0, 0
    with torch.no_grad():
        for rows in torch.split(ids, 2):
            logits = model(input_ids=rows).logits[:, :-1].float()
            total += float(
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")
            )
            count += rows[:, 1:].numel()
    return math.exp(total / count)


def modifier(name: str) -> Any:
    """The peer's recipe for one of our method names."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
    from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier

    if name.startswith("gptq"):
        weights = {"num_bits": 4, "type": "int", "symmetric": name == "gptq", "strategy": "group", "group_size": 64}
        return GPTQModifier(config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])
    mask = {"mask_structure": "2:4"} if name.endswith("2:4") else {}
    kind = SparseGPTModifier if name.startswith("sparsegpt") else WandaPruningModifier
    return kind(sparsity=0.5, targets=["Linear"], ignore=["lm_head"], **mask)


def main() -> None:
    folder, name, calibration = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    from llmcompressor import oneshot
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    ids = torch.from_numpy(np.load(calibration))
    rows: Any = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "model" / "tokenizer.json"), pad_token="<|endoftext|>"
    )
    start, cpu = time.perf_counter(), time.process_time()
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=DataLoader(rows, batch_size=4),
        recipe=modifier(name),
        max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids),
        pipeline="sequential",
    )
    out = {
        "cpu_s": time.process_time() - cpu,
        "seconds": time.perf_counter() - start,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }
    print(json.dumps(out | {"perplexity": perplexity(model, folder / "evaluation.npy")}))


if __name__ == "__main__":
    main()
