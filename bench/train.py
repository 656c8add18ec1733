"""Training passes on a real classifier: accuracy and speed of a distilled half, of a pruned and recovered model, and of early exits.

    python -m bench.train MODEL DATA --press OUT [--device cuda] [--only distill …]   trains, best on a GPU; writes changed tensors to OUT
    python -m bench.train MODEL DATA --measure OUT [--threads 2] [--rounds 3] [--json] measures these models on this machine's CPU

MODEL is the folder of a classifier. DATA is a folder with rt_sentiment_train.jsonl.gz, rt_sentiment_test.jsonl.gz and, for texts without
labels, lm_train_austen_moby.txt.gz. Accuracy is that on all test rows, which no training has seen. Latencies are those of ONNX Runtime
and torch with batch 1; source and result run in turns. Steps per second are compared with a plain loop over the same models, data,
precision and optimizer.
"""

import argparse
import gzip
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.train_cpu import measure, show
from bench.train_steps import TRAIN, compare_steps, read_lines
from bench.trained import accuracy, ship, test_rows
from nightpress.core.compress.context import PassContext
from nightpress.core.compress.data.examples import Examples
from nightpress.core.compress.passes import MODEL_PASSES
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe

RECIPES: dict[str, list[dict[str, Any]]] = {
    # First texts without labels, with only the teacher's hidden states and logits; then the classifier's own labelled rows.
    "distill": [
        {
            "pass": "distill",
            "student": {"layers": [0, 2, 4]},
            "logits": {},
            "hidden": {"layers": [1, 3, 5], "weight": 1.0},
            "train": {**TRAIN, "data": "both", "epochs": 2, "learning_rate": 2e-4, "precision": "bf16"},
        },
        {"pass": "recover", "logits": {"alpha": 0.7}, "train": {**TRAIN, "epochs": 4, "precision": "bf16"}},
    ],
    "distill-rows-only": [
        {
            "pass": "distill",
            "student": {"layers": [0, 2, 4]},
            "logits": {"alpha": 0.7},
            "hidden": {"layers": [1, 3, 5], "weight": 1.0},
            "train": {**TRAIN, "epochs": 8, "learning_rate": 2e-4, "precision": "bf16"},
        }
    ],
    "prune": [
        {"pass": "channels", "share": 0.25},
        {"pass": "heads", "share": 0.25},
        {"pass": "recover", "logits": {"alpha": 0.7}, "train": {**TRAIN, "epochs": 4, "precision": "bf16"}},
    ],
    "early-exit": [
        {
            "pass": "early-exit",
            "exits": [1, 2, 3, 4],
            "train": {**TRAIN, "epochs": 8, "validation": 0.1, "precision": "bf16"},
        }
    ],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--press", type=Path)
    parser.add_argument("--measure", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="*", choices=[*RECIPES, "steps"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--texts", type=int, default=200, help="test rows that are timed")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if given.press is not None:
        found = press(given.model, given.data, given.press, given.device, given.only or [*RECIPES, "steps"])
    elif given.measure is not None:
        names = given.only or [*RECIPES, "steps"]
        found = measure(given.model, given.data, given.measure, given.threads, given.rounds, given.texts, names)
        if not given.json:
            show(found)
    else:
        parser.error("say --press OUT or --measure OUT")
    from bench.record import finish
    from bench.train_figures import figures_of

    inputs = ("model", "data", "press", "measure", "device", "only", "json")
    return finish("train", figures_of(found, given.device), parser, given, choices=inputs)


# Training ------------------------------------------------------------------------------------------------------------


def press(model: Path, data: Path, out: Path, device: str, names: list[str]) -> dict[str, Any]:
    """Run the recipes. Writes the changed tensors to `out` in float16, and the figures to `out`/train.json. Returns the figures."""
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    with tempfile.TemporaryDirectory() as scratch:
        files = data_files(data, Path(scratch))
        test = test_rows(model, files["test"])
        found["source_accuracy"] = accuracy(model, model, test, device)
        for name in names:
            if name == "steps":
                found["steps"] = compare_steps(model, files["train"], device, Path(scratch))
            elif all(options["pass"] in MODEL_PASSES for options in RECIPES[name]):
                found[name] = _press_one(name, model, files, out, device, Path(scratch) / name, test)
            else:
                found[name] = "skipped: a pass of it is not there"
            print(name, json.dumps(found[name]), file=sys.stderr, flush=True)
            (out / "train.json").write_text(json.dumps(found, indent=1))
    return found


def _press_one(
    name: str, model: Path, files: dict[str, Path], out: Path, device: str, scratch: Path, test: Examples
) -> dict[str, Any]:
    recipe = parse_recipe({"name": "bench", "passes": RECIPES[name], "exports": ["onnx"]})
    folder, records = model, []
    started = time.monotonic()
    for at, options in enumerate(recipe.passes):
        context = PassContext(
            header=inspect_model(FolderFiles(folder)),
            work_dir=scratch / "work",
            origin=model,
            device=device,
            index=at,
            threads=torch.get_num_threads(),
            data_files=files,
            calibration=recipe.calibration,
        )
        context.work_dir.mkdir(parents=True, exist_ok=True)
        target = scratch / f"{at}-{options.name}"
        records.append(MODEL_PASSES[options.name](folder, target, options, context))
        folder = target
    seconds = time.monotonic() - started
    ship(model, folder, out / name)
    return {
        "seconds": round(seconds, 1),
        "test_accuracy": accuracy(folder, model, test, device),
        "passes": [{"name": record.name, "summary": record.summary} for record in records],
        "curves": [{"name": curve.name, "x": curve.x, "y": curve.y} for curve in records[-1].series],
    }


def data_files(data: Path, scratch: Path) -> dict[str, Path]:
    """The data files: `train` and `test` rows with labels, and `both`: the training texts and paragraphs of novels, without labels."""
    files = {"train": data / "rt_sentiment_train.jsonl.gz", "test": data / "rt_sentiment_test.jsonl.gz"}
    rows = [json.loads(line)["text"] for line in read_lines(files["train"])] * 2
    prose = data / "lm_train_austen_moby.txt.gz"
    if prose.is_file():
        text = gzip.decompress(prose.read_bytes()).decode().replace("\r", "")
        rows += [" ".join(part.split()) for part in text.split("\n\n") if 60 < len(part) < 400][:20_000]
    files["both"] = scratch / "both.jsonl"
    files["both"].write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return files


if __name__ == "__main__":
    sys.exit(main())
