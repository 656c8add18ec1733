"""Runs auto-round for bench.low_bits, in the peer's own environment. It imports none of our code.

PYTHON bench/peer_autoround.py MODEL SETTINGS.json CALIBRATION.npy OUT

Writes the model with rounded weights as floats to OUT, and prints as JSON the seconds of the quantization and the GPU's peak in bytes.
OUT may be `-`: then nothing is written.
"""

import importlib.util
import json
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch


def stand_in_for_datasets() -> None:
    """Let auto-round be imported without the package datasets, which it needs only to fetch text from the Hub."""
    if importlib.util.find_spec("datasets") is None:
        module: Any = types.ModuleType("datasets")
        module.__getattr__ = _any_class
        module.__spec__ = importlib.util.spec_from_loader("datasets", None)
        sys.modules["datasets"] = module


def _any_class(name: str) -> type:
    """A class of any name. Modules have no other attributes with two underscores than Python's own."""
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})


def tokenizer_of(source: Path) -> Any:
    """The model's tokenizer; for a model of a shape alone, any. The calibration is tokens already."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if (source / "tokenizer.json").exists():
        return AutoTokenizer.from_pretrained(source)
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1}, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")


def main() -> None:
    source, settings, calibration, out = Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    stand_in_for_datasets()
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM

    ids = torch.from_numpy(np.load(calibration))
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in ids]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    rounder = AutoRound(
        model,
        tokenizer_of(source),
        nsamples=len(ids),
        seqlen=ids.shape[1],
        dataset=rows,
        device_map=device,
        **settings,
    )
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    rounded, _ = rounder.quantize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    if out != "-":
        # A layer whose inputs would be rounded, too, is wrapped.
        held = {name.replace(".orig_layer.", "."): tensor for name, tensor in rounded.state_dict().items()}
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in held.items()}
        plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        plain.load_state_dict({name: state[name] for name in plain.state_dict()})
        plain.save_pretrained(out)
    print("@result " + json.dumps({"seconds": seconds, "peak": peak}))


if __name__ == "__main__":
    main()
