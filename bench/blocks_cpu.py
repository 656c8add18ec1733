"""The blocks executor on a CPU: CPU seconds, peak memory and perplexity on a real small language model, beside llm-compressor.

    python -m bench.blocks_cpu [--method NAME …] [--seeds 2] [--side ours|peer] [--keep FOLDER] [--peer PYTHON | --no-peer]

Both sides get the same fp32 model, the same calibration tokens and the same number of threads. The figures are those of a whole process,
from its start to the saved folder: imports, loading, calibration, solving, saving. The peak is that of resident memory, mapped files
included. Another process then loads the saved folder with transformers and measures its perplexity. The other side, the peer, runs in its
own environment, whose interpreter is PYTHON. Without --peer, the environment is made from bench/peer-requirements.txt, which takes some
minutes and 2 GB of disk. Each seed calibrates both sides on other windows of the same prose. A difference counts only if it exceeds the
spread over the seeds. With --keep, the figures of each run are stored in FOLDER, and a run whose figures are there is not repeated. So
the benchmark can be run in parts.

The model's weights were 4-bit before they were dequantized, which favours 4-bit grids like the original one. The peer's AWQ needs a GPU.
Bars: at most half of the peer's CPU seconds and half of its peak for GPTQ, SparseGPT and Wanda; for every method, a perplexity above the
peer's by no more than the spread over the seeds.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

from bench.record import Figure, finish, make_parser

METHODS: dict[str, dict[str, Any]] = {
    "gptq": {"pass": "gptq", "group_size": 64},
    "gptq-published": {"pass": "gptq", "group_size": 64, "ranges": "extremes", "order": "natural", "refine": False},
    "gptq-asymmetric": {"pass": "gptq", "group_size": 64, "symmetric": False},
    "sparsegpt-50%": {"pass": "sparsegpt", "sparsity": 0.5},
    "sparsegpt-2:4": {"pass": "sparsegpt", "pattern": "2:4"},
    "wanda-50%": {"pass": "wanda", "sparsity": 0.5},
    "wanda-2:4": {"pass": "wanda", "pattern": "2:4"},
    "smoothquant": {"pass": "smoothquant"},
    "smoothquant-0.5": {"pass": "smoothquant", "alpha": 0.5},
    "nearest": {"pass": "weight-only", "bits": 4, "group_size": 64, "ranges": "extremes"},
    "awq": {"pass": "awq", "group_size": 64},
}
USUAL = ("gptq", "sparsegpt-50%", "sparsegpt-2:4", "wanda-50%", "smoothquant-0.5", "nearest")
HALVED = ("gptq", "sparsegpt", "wanda")  #: the methods whose bar is half of the peer's time and memory
EVALUATED = (32, 512)  #: windows of the built-in evaluation prose, tokens each
MOST_SEEDS = 4
HERE = Path(__file__).parent


def prepare(folder: Path, samples: int, length: int) -> None:
    """Write the model, and the token ids for calibration and evaluation, for both sides."""
    import numpy as np

    from nightpress.core.compress.data.rows import read_rows
    from nightpress.core.compress.data.tokenized import open_tokenizer, text_windows
    from tests.models import smollm_dir

    model = folder / "model"
    shutil.move(smollm_dir(), model)
    tokenizer = open_tokenizer(model)
    rows = read_rows("builtin:prose", None, purpose="calibration")
    for seed in range(MOST_SEEDS):
        start = len(rows) * seed // MOST_SEEDS
        moved = rows[start:] + rows[:start]
        ids = text_windows(moved, tokenizer, samples=samples, length=length, ref="builtin:prose").ids
        np.save(folder / f"calibration-{seed}.npy", ids)
    rows = read_rows("builtin:prose", None)
    count, width = EVALUATED
    np.save(
        folder / "evaluation.npy",
        text_windows(rows, tokenizer, samples=count, length=width, ref="builtin:prose").ids,
    )


def press(source: Path, name: str, calibration: Path, out: Path) -> None:
    """Run one of our methods in this process."""
    import numpy as np
    import torch

    from nightpress.core.compress.passes import MODEL_PASSES, PassContext, blockwise
    from nightpress.core.recipes.inspect import FolderFiles, inspect_model
    from nightpress.core.recipes.models import parse_recipe

    options = METHODS[name]
    export = "safetensors" if options["pass"] in {"sparsegpt", "wanda"} else "compressed-tensors"
    recipe = parse_recipe({"name": "bench", "passes": [options], "exports": [export]})
    ids = torch.from_numpy(np.load(calibration))
    blockwise.calibration_samples = lambda *_: {"input_ids": ids}  # the same tokens as the peer's
    context = PassContext(header=inspect_model(FolderFiles(source)), work_dir=out.with_suffix(".work"))
    MODEL_PASSES[options["pass"]](source, out, recipe.passes[0], context)


def perplexity(model_dir: Path, file: Path) -> float:
    """The perplexity of a saved model over the windows of token ids in an .npy file."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype="float32")
    ids = torch.from_numpy(np.load(file))
    total, count = 0.0, 0
    with torch.no_grad():
        for rows in torch.split(ids, 2):
            logits = model(input_ids=rows).logits[:, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")
            total += float(loss)
            count += rows[:, 1:].numel()
    return math.exp(total / count)


def measured(command: list[str], folder: Path, out: Path) -> dict[str, Any]:
    """Run a method in a new process. Returns the process's time and memory, and the size and perplexity of its result."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    start = time.perf_counter()
    with (folder / "child.log").open("w") as log:
        child = subprocess.Popen([*command, str(out)], env=environment, stdout=log, stderr=log)
        _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        lines = (folder / "child.log").read_text().strip().splitlines() or ["it said nothing"]
        return {"failed": lines[-1][:300]}
    figures = {
        "cpu_s": used.ru_utime + used.ru_stime,
        "seconds": time.perf_counter() - start,
        "peak_gb": used.ru_maxrss * 1024 / 1e9,
        "written_mb": sum(file.stat().st_size for file in out.glob("*.safetensors")) / 1e6,
    }
    weighed = subprocess.run(
        [sys.executable, "-m", "bench.blocks_cpu", "--evaluate", str(out), str(folder / "evaluation.npy")],
        capture_output=True,
        text=True,
        check=True,
    )
    return figures | {"perplexity": float(weighed.stdout.strip().splitlines()[-1])}


def make_peer(folder: Path) -> str:
    """Make an environment with the peer installed. Returns its interpreter."""
    print("making the peer's environment …", file=sys.stderr, flush=True)
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    requirements = str(HERE / "peer-requirements.txt")
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "-r", requirements], check=True)
    return python


def figures_of(name: str, runs: dict[str, list[dict[str, Any]]]) -> list[Figure]:
    """Means over the seeds, the spread of the perplexities, and our figures as a fraction of the peer's.

    Raises SystemExit if a run failed.
    """
    figures, means, spreads = [], {}, {}
    for side, seeds in runs.items():
        for run in seeds:
            if "failed" in run:
                raise SystemExit(f"{name}, {side}: {run['failed']}")
        if not seeds:
            continue
        perplexities = [run["perplexity"] for run in seeds]
        spreads[side] = max(perplexities) - min(perplexities)
        mean = means[side] = {key: sum(run[key] for run in seeds) / len(seeds) for key in seeds[0]}
        ends = (round(min(perplexities), 2), round(max(perplexities), 2)) if len(seeds) > 1 else None
        figures += [
            Figure(f"{name}/{side}_cpu", round(mean["cpu_s"]), "CPU seconds"),
            Figure(f"{name}/{side}_peak", round(mean["peak_gb"], 2), "GB"),
            Figure(f"{name}/{side}_written", round(mean["written_mb"]), "MB"),
            Figure(f"{name}/{side}_perplexity", round(mean["perplexity"], 2), "", ends),
        ]
    if len(means) == 2:
        half = "<= 0.5" if name.startswith(HALVED) else ""
        for key, mean_key in (("cpu", "cpu_s"), ("peak", "peak_gb")):
            ratio = means["ours"][mean_key] / means["peer"][mean_key]
            figures.append(Figure(f"{name}/{key}_ratio", round(ratio, 2), "of the peer's", bar=half))
        worse = means["ours"]["perplexity"] - means["peer"]["perplexity"]
        bar = f"<= {round(max(spreads.values()), 4)}"
        figures.append(Figure(f"{name}/perplexity_above", round(worse, 2), "above the peer's", bar=bar))
    return figures


def main() -> int:
    parser = make_parser("blocks_cpu", __doc__)
    parser.add_argument("--method", nargs="*", choices=sorted(METHODS), default=list(USUAL))
    parser.add_argument("--seeds", type=int, choices=range(1, MOST_SEEDS + 1), default=2)
    parser.add_argument(
        "--side", choices=("ours", "peer"), help="measure this one alone; what is kept of the other is shown"
    )
    parser.add_argument("--keep", type=Path, help="leave figures here, and take what is here for granted")
    parser.add_argument("--peer", help="a Python with llmcompressor installed")
    parser.add_argument("--no-peer", action="store_true", help="only our figures")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--child", nargs=4, metavar=("MODEL", "NAME", "CALIBRATION", "OUT"), help=argparse.SUPPRESS)
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--evaluate", nargs=2, metavar=("MODEL", "EVALUATION"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        source, name, calibration, target = options.child
        press(Path(source), name, Path(calibration), Path(target))
        return 0
    if options.prepare:
        prepare(options.prepare, options.samples, options.length)
        return 0
    if options.evaluate:
        print(perplexity(Path(options.evaluate[0]), Path(options.evaluate[1])))
        return 0
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        ours = [sys.executable, "-m", "bench.blocks_cpu"]
        # In a separate process: a child's peak memory is never below that of its parent.
        if not (folder / "evaluation.npy").exists():
            sizes = ["--samples", str(options.samples), "--length", str(options.length)]
            subprocess.run([*ours, "--prepare", str(folder), *sizes], check=True)
        commands = {"ours": [*ours, "--child"]}
        if not options.no_peer:
            python = options.peer or ("" if options.side == "ours" else make_peer(Path(scratch) / "peer"))
            commands["peer"] = [python, str(HERE / "peer_llmcompressor.py")]
        for name in options.method:
            runs: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
            for seed in range(options.seeds):
                for side, command in commands.items():
                    kept = folder / f"{name}-{seed}-{side}.json"
                    if not kept.exists() and options.side in {None, side} and (side, name) != ("peer", "awq"):
                        model, texts = str(folder / "model"), str(folder / f"calibration-{seed}.npy")
                        found = measured(
                            [*command, model, name, texts], folder, Path(scratch) / f"{name}-{seed}-{side}"
                        )
                        kept.write_text(json.dumps(found))
                    if kept.exists():
                        runs[side].append(json.loads(kept.read_text()))
            figures += figures_of(name, runs)
            print(name, file=sys.stderr, flush=True)
    return finish("blocks_cpu", figures, parser, options, choices=("method", "side", "keep", "peer", "no_peer"))


if __name__ == "__main__":
    sys.exit(main())
