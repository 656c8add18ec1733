"""The blocks executor on a CPU: CPU seconds, peak memory and perplexity on a real small language model, beside llm-compressor.

    python -m bench.blocks_cpu [--method NAME …] [--seeds 2] [--side ours|peer] [--keep FOLDER] [--peer PYTHON | --no-peer] [--json]

Both get the same fp32 model, the same calibration tokens and as many threads. What is counted is a whole process, from its start to the
saved folder: imports, loading, calibrating, solving, saving. Its peak is that of its resident memory, files it maps included. Perplexity is
then measured on the saved folder, as transformers loads it, by one and the same process. The peer runs in an environment of its own:
PYTHON is its interpreter; without it one is made from bench/peer-requirements.txt, which takes some minutes and 2 GB of disk. A further
seed calibrates both on other windows of the same prose: the spread of a method's perplexity over seeds is what a difference has to exceed.
With --keep, figures are left in FOLDER and a run whose figures are there is not repeated: so the whole can be taken in pieces.

The model's weights were 4-bit before they were de-quantized: 4-bit figures on it flatter grids like its own. The peer's AWQ does not run
without a GPU. Bars: half of the peer's CPU seconds and half of its peak for GPTQ, SparseGPT and Wanda; a perplexity no worse than the
peer's by more than it varies from seed to seed, for every method.
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
HALVED = ("gptq", "sparsegpt", "wanda")  #: the methods that are to take half of what the peer takes
EVALUATED = (32, 512)  #: windows of the built-in evaluation prose, tokens each
MOST_SEEDS = 4
HERE = Path(__file__).parent


def prepare(folder: Path, samples: int, length: int) -> None:
    """The model, and the token ids to calibrate and to evaluate on, for both sides."""
    import numpy as np

    from nightpress.core.compress.data.tokenized import open_tokenizer, read_rows, text_windows
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
    """One method of ours, in this process."""
    import numpy as np
    import torch

    from nightpress.core.compress.passes import MODEL_PASSES, PassContext, calibrated
    from nightpress.core.recipes.inspect import FolderFiles, inspect_model
    from nightpress.core.recipes.models import parse_recipe

    given = METHODS[name]
    export = "safetensors" if given["pass"] in {"sparsegpt", "wanda"} else "compressed-tensors"
    recipe = parse_recipe({"name": "bench", "passes": [given], "exports": [export]})
    ids = torch.from_numpy(np.load(calibration))
    calibrated.calibration_samples = lambda *_: {"input_ids": ids}  # the very tokens that the peer gets
    context = PassContext(header=inspect_model(FolderFiles(source)), work_dir=out.with_suffix(".work"))
    MODEL_PASSES[given["pass"]](source, out, recipe.passes[0], context)


def perplexity(model_dir: Path, file: Path) -> float:
    """Of a saved folder, over the windows of token ids in an .npy file."""
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
    """Press in a process of its own, and weigh that process and what it left."""
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
        "written_mb": sum(one.stat().st_size for one in out.glob("*.safetensors")) / 1e6,
    }
    weighed = subprocess.run(
        [sys.executable, "-m", "bench.blocks_cpu", "--evaluate", str(out), str(folder / "evaluation.npy")],
        capture_output=True,
        text=True,
        check=True,
    )
    return figures | {"perplexity": float(weighed.stdout.strip().splitlines()[-1])}


def make_peer(folder: Path) -> str:
    """An environment with the peer in it; its interpreter."""
    print("making the peer's environment …", file=sys.stderr, flush=True)
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    requirements = str(HERE / "peer-requirements.txt")
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "-r", requirements], check=True)
    return python


def compare(name: str, ours: list[dict[str, Any]], peers: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds, the spread of the perplexities, what we take of what the peer takes, and the bars that are missed."""
    out: dict[str, Any] = {}
    for side, runs in {"ours": ours, "llm-compressor": peers}.items():
        if any("failed" in one for one in runs):
            out[side] = next(one for one in runs if "failed" in one)
        elif runs:
            figures = [one["perplexity"] for one in runs]
            out[side] = {key: sum(one[key] for one in runs) / len(runs) for key in runs[0]}
            out[side]["perplexity_spread"] = max(figures) - min(figures)
    if len(out) == 2 and all("failed" not in one for one in out.values()):
        us, them = out["ours"], out["llm-compressor"]
        out["ratio"] = {key: us[key] / them[key] for key in ("cpu_s", "peak_gb", "perplexity")}
        spread = max(us["perplexity_spread"], them["perplexity_spread"])
        held = {"perplexity": us["perplexity"] <= them["perplexity"] + spread}
        if name.startswith(HALVED):
            held |= {key: out["ratio"][key] <= 0.5 for key in ("cpu_s", "peak_gb")}
        out["missed"] = [key for key, one in held.items() if not one]
    return out


def line(name: str, one: dict[str, Any]) -> str:
    parts = []
    for side in ("ours", "llm-compressor"):
        figures = one.get(side, {"failed": "not run"})
        parts.append(
            f"{side}: {figures['failed']}"
            if "failed" in figures
            else f"{side} {figures['cpu_s']:.0f} CPU-s, {figures['peak_gb']:.2f} GB, {figures['written_mb']:.0f} MB, "
            f"perplexity {figures['perplexity']:.2f} ± {figures['perplexity_spread'] / 2:.2f}"
        )
    if "ratio" in one:
        ratio = one["ratio"]
        parts.append(f"ratios {ratio['cpu_s']:.2f}, {ratio['peak_gb']:.2f}, {ratio['perplexity']:.3f}")
        parts.append(f"MISS {', '.join(one['missed'])}" if one["missed"] else "PASS")
    return f"{name}: {'; '.join(parts)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument("--child", nargs=4, metavar=("MODEL", "NAME", "CALIBRATION", "OUT"), help=argparse.SUPPRESS)
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--evaluate", nargs=2, metavar=("MODEL", "EVALUATION"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        source, name, calibration, target = given.child
        press(Path(source), name, Path(calibration), Path(target))
        return 0
    if given.prepare:
        prepare(given.prepare, given.samples, given.length)
        return 0
    if given.evaluate:
        print(perplexity(Path(given.evaluate[0]), Path(given.evaluate[1])))
        return 0
    out: dict[str, Any] = {"samples": given.samples, "length": given.length, "seeds": given.seeds}
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        ours = [sys.executable, "-m", "bench.blocks_cpu"]
        if not (
            folder / "evaluation.npy"
        ).exists():  # in a process of its own: a child's peak is never below its parent's
            sizes = ["--samples", str(given.samples), "--length", str(given.length)]
            subprocess.run([*ours, "--prepare", str(folder), *sizes], check=True)
        commands = {"ours": [*ours, "--child"]}
        if not given.no_peer:
            python = given.peer or ("" if given.side == "ours" else make_peer(Path(scratch) / "peer"))
            commands["peer"] = [python, "-P", str(HERE / "peer_llmcompressor.py")]  # this folder has a queue.py
        for name in given.method:
            runs: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
            for seed in range(given.seeds):
                for side, command in commands.items():
                    kept = folder / f"{name}-{seed}-{side}.json"
                    if not kept.exists() and given.side in {None, side} and (side, name) != ("peer", "awq"):
                        model, texts = str(folder / "model"), str(folder / f"calibration-{seed}.npy")
                        found = measured(
                            [*command, model, name, texts], folder, Path(scratch) / f"{name}-{seed}-{side}"
                        )
                        kept.write_text(json.dumps(found))
                    if kept.exists():
                        runs[side].append(json.loads(kept.read_text()))
            out[name] = compare(name, runs["ours"], runs["peer"])
            if not given.json:
                print(line(name, out[name]), flush=True)
    if given.json:
        print(json.dumps(out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
