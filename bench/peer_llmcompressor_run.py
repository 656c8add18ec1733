"""Runs llm-compressor's one-shot GPTQ (W4A16, groups of 128) on a GPU for bench.peer_llmcompressor_gpu. It imports none of our code.

PYTHON bench/peer_llmcompressor_run.py MODEL SAMPLES LENGTH [OUT]

Started by torchrun, its processes share out the samples, as its own examples do. The last line is JSON: the seconds of each part, and the
peaks of memory in bytes.
"""

import time

BEGAN = time.monotonic()

import json  # noqa: E402 - the seconds of the imports are counted
import os  # noqa: E402
import resource  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from llmcompressor import oneshot  # noqa: E402
from llmcompressor.modifiers.gptq import GPTQModifier  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast  # noqa: E402

BATCH = 8


def load(source: Path) -> Any:
    """The model in the host's memory, from where its blocks go to the GPU one after the other."""
    if "WORLD_SIZE" not in os.environ:
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    from compressed_tensors.offload import load_offloaded_model

    with load_offloaded_model():
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, device_map="auto_offload")


def main() -> None:
    source, samples, length = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if "WORLD_SIZE" in os.environ:
        from compressed_tensors.distributed import init_dist

        init_dist()
    marks = [BEGAN, time.monotonic()]
    model = load(source)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(source / "tokenizer.json"), pad_token="[PAD]")
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (samples, length), generator=generator)[rank::processes]
    rows: Any = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    marks.append(time.monotonic())
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=DataLoader(rows, batch_size=BATCH),
        recipe=GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"]),
        max_seq_length=length,
        num_calibration_samples=len(rows),
        pipeline="sequential",
    )
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    marks.append(time.monotonic())
    if len(sys.argv) > 4:
        model.save_pretrained(sys.argv[4], save_compressed=True)
        tokenizer.save_pretrained(sys.argv[4])
    marks.append(time.monotonic())
    parts = ("importing", "loading", "solving", "saving")
    told = {part: end - start for part, start, end in zip(parts, marks, marks[1:], strict=False)}
    told["host_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    told["gpu_bytes"] = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    if rank == 0:
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
