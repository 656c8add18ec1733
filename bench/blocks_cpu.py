"""The blocks executor on a CPU: CPU seconds, peak memory and perplexity on a real small language model, beside llm-compressor.

    python -m bench.blocks_cpu [--only NAME …] [--peer PYTHON] [--samples 32] [--length 512] [--json]

PYTHON is the interpreter of an environment of its own with llmcompressor 0.14 in it; without it only our figures are printed. Both get
the same model, the same calibration tokens and the same text for perplexity, one method a process, on one thread. The model's weights
were 4-bit before they were de-quantized: 4-bit figures on it flatter grids like its own.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

METHODS: dict[str, dict[str, Any]] = {
    "gptq": {"pass": "gptq", "group_size": 64},
    "gptq-asymmetric": {"pass": "gptq", "group_size": 64, "symmetric": False},
    "awq": {"pass": "awq", "group_size": 64},
    "sparsegpt-50%": {"pass": "sparsegpt", "sparsity": 0.5},
    "sparsegpt-2:4": {"pass": "sparsegpt", "pattern": "2:4"},
    "wanda-50%": {"pass": "wanda", "sparsity": 0.5},
    "wanda-2:4": {"pass": "wanda", "pattern": "2:4"},
}
EVALUATED = (32, 512)  #: windows of the built-in evaluation prose, tokens each


def prepare(folder: Path, samples: int, length: int) -> None:
    """The model, and the token ids to calibrate and to evaluate on, for both sides."""
    import numpy as np

    from core.compress.evaluate.data import open_tokenizer, read_rows, text_windows
    from tests.models import smollm_dir

    model = smollm_dir()
    (folder / "model").symlink_to(model)
    tokenizer = open_tokenizer(model)
    for purpose, (count, width) in {"calibration": (samples, length), "evaluation": EVALUATED}.items():
        rows = read_rows("builtin:prose", None, purpose=purpose)
        ids = text_windows(rows, tokenizer, samples=count, length=width, ref="builtin:prose").ids
        np.save(folder / f"{purpose}.npy", ids)


def press(folder: Path, name: str, samples: int, length: int) -> dict[str, float]:
    """One method of ours, in this process."""
    from transformers import AutoModelForCausalLM

    from bench.peer_llmcompressor import perplexity
    from core.compress.passes import MODEL_PASSES, PassContext
    from core.recipes.inspect import FolderFiles, inspect_model
    from core.recipes.models import Calibration, parse_recipe

    given = METHODS[name]
    export = "compressed-tensors" if given["pass"] in {"gptq", "awq"} else "safetensors"
    recipe = parse_recipe({"name": "bench", "passes": [given], "exports": [export]})
    source, work = folder / "model", folder / f"work-{name}"
    work.mkdir()
    context = PassContext(
        header=inspect_model(FolderFiles(source)),
        work_dir=work,
        calibration=Calibration(samples=samples, length=length),
    )
    start, cpu = time.perf_counter(), time.process_time()
    MODEL_PASSES[given["pass"]](source, work / "out", recipe.passes[0], context)
    out = {
        "cpu_s": time.process_time() - cpu,
        "seconds": time.perf_counter() - start,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }
    model = AutoModelForCausalLM.from_pretrained(work / "out", dtype="float32")
    return out | {"perplexity": perplexity(model, folder / "evaluation.npy")}


def child(command: list[str]) -> dict[str, float]:
    """Run one method in a process of its own; its last line is the result."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:
        return {"failed": run.stderr.strip().splitlines()[-1][:300]}  # type: ignore[dict-item]
    result: dict[str, float] = json.loads(run.stdout.strip().splitlines()[-1])
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=sorted(METHODS))
    parser.add_argument("--peer", help="a Python with llmcompressor installed")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "NAME"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(press(Path(given.child[0]), given.child[1], given.samples, given.length)))
        return 0
    out: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder, given.samples, given.length)
        sizes = ["--samples", str(given.samples), "--length", str(given.length)]
        for name in given.only or METHODS:
            ours = [sys.executable, "-m", "bench.blocks_cpu", *sizes, "--child", scratch, name]
            out[name] = {"ours": child(ours)}
            if given.peer:
                peer = str(Path(__file__).with_name("peer_llmcompressor.py"))
                out[name]["llm-compressor"] = child([given.peer, peer, scratch, name])
            if not given.json:
                print(name, json.dumps(out[name]), flush=True)
    if given.json:
        print(json.dumps(out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
