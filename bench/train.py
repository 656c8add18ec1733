"""Training passes on a real classifier: what a distilled half, a pruned and recovered model and early exits keep, and how fast they are.

    python -m bench.train MODEL DATA --press OUT [--device cuda] [--only distill …]   trains, best on a GPU; leaves what changed in OUT
    python -m bench.train MODEL DATA --measure OUT [--threads 2] [--rounds 3] [--json] measures those on this machine's CPU

MODEL is a classifier's folder, DATA one with rt_sentiment_train.jsonl.gz, rt_sentiment_test.jsonl.gz and, for texts without labels,
lm_train_austen_moby.txt.gz. Accuracy is that on all test rows, which nothing was trained on. Latencies are ONNX Runtime's and torch's, batch 1,
source and result by turns in fresh processes. The bar for steps is a plain loop over the same models, data, precision and optimizer.
"""

import argparse
import gzip
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from nightpress.core.compress.checkpoint import read_shards
from nightpress.core.compress.context import PassContext
from nightpress.core.compress.executors.examples import Examples, collate, read_examples
from nightpress.core.compress.executors.skeleton import Source
from nightpress.core.compress.networks import load_model
from nightpress.core.compress.passes import MODEL_PASSES
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe

TRAIN = {"data": "train", "length": 96, "batch": 32, "learning_rate": 1e-4, "validation": 0.05}
RECIPES: dict[str, list[dict[str, Any]]] = {
    # Prose first, by the teacher's hidden states and answers alone; then the classifier's own rows.
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
        from bench.train_cpu import measure, show

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
    """Run the recipes; what changed of the model's tensors goes to OUT in float16, and what was found to OUT/train.json."""
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    with tempfile.TemporaryDirectory() as scratch:
        files = _data(data, Path(scratch))
        test = test_rows(model, files["test"])
        found["source_accuracy"] = accuracy(model, model, test, device)
        for name in names:
            if name == "steps":
                found["steps"] = compare_steps(model, files["train"], device, Path(scratch))
            elif all(one["pass"] in MODEL_PASSES for one in RECIPES[name]):
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
    _ship(model, folder, out / name)
    return {
        "seconds": round(seconds, 1),
        "test_accuracy": accuracy(folder, model, test, device),
        "passes": [{"name": one.name, "summary": one.summary} for one in records],
        "curves": [{"name": curve.name, "x": curve.x, "y": curve.y} for curve in records[-1].series],
    }


def _data(data: Path, scratch: Path) -> dict[str, Path]:
    """The rows, and the rows beside paragraphs of novels, all without labels."""
    files = {"train": data / "rt_sentiment_train.jsonl.gz", "test": data / "rt_sentiment_test.jsonl.gz"}
    rows = [json.loads(line)["text"] for line in _lines(files["train"])] * 2
    prose = data / "lm_train_austen_moby.txt.gz"
    if prose.is_file():
        text = gzip.decompress(prose.read_bytes()).decode().replace("\r", "")
        rows += [" ".join(part.split()) for part in text.split("\n\n") if 60 < len(part) < 400][:20_000]
    files["both"] = scratch / "both.jsonl"
    files["both"].write_text("".join(json.dumps({"text": one}) + "\n" for one in rows))
    return files


def _lines(file: Path) -> list[str]:
    return gzip.decompress(file.read_bytes()).decode().splitlines()


def test_rows(model: Path, file: Path) -> Examples:
    header = inspect_model(FolderFiles(model))
    return read_examples(model, header, "test", file, length=128, labelled=True)


def accuracy(folder: Path, source: Path, test: Examples, device: str = "cpu") -> float:
    """Share of the test rows that the model answers as their labels say; with early exits, at full depth."""
    config = json.loads((folder / "config.json").read_bytes())
    model = load_model(folder, inspect_model(FolderFiles(source)).model_copy(update={"config": config})).to(device)
    right = 0
    with torch.inference_mode():
        for start in range(0, len(test), 50):
            batch = collate(test, np.arange(start, min(start + 50, len(test))), torch.device(device))
            logits = model(input_ids=batch.ids, attention_mask=batch.mask).logits
            right += int((logits.argmax(-1) == batch.labels).sum())
    return right / len(test)


def _ship(model: Path, folder: Path, out: Path) -> None:
    """Leave in `out` the tensors that aren't the source's, in files of less than 16 MiB, and the small files that differ."""
    out.mkdir(parents=True, exist_ok=True)
    before = Source(read_shards(model))
    after = Source(read_shards(folder))
    parts: list[dict[str, torch.Tensor]] = [{}]
    for name in after.names():
        tensor = after.read(name)
        if name in before and torch.equal(before.read(name).float(), tensor.float()):
            continue
        half = tensor.half() if tensor.is_floating_point() else tensor
        if sum(one.nbytes for one in parts[-1].values()) + half.nbytes > 15_000_000:
            parts.append({})
        parts[-1][name] = half
    for at, part in enumerate(parts):
        save_file(part, out / f"changed-{at}.safetensors")
    (out / "names.json").write_text(json.dumps(after.names()))
    if (folder / "exits").is_dir():
        shutil.copytree(folder / "exits", out / "exits", dirs_exist_ok=True)
    for file in folder.iterdir():
        same = model / file.name
        if file.suffix in {".safetensors"} or file.name.endswith("index.json") or not file.is_file():
            continue
        if not same.is_file() or same.read_bytes() != file.read_bytes():
            shutil.copyfile(file, out / file.name)


def unship(model: Path, shipped: Path, folder: Path) -> None:
    """The whole model again, from the source and what was shipped."""
    folder.mkdir(parents=True)
    before = Source(read_shards(model))
    changed = {name: one for file in sorted(shipped.glob("changed-*")) for name, one in load_file(file).items()}
    names = json.loads((shipped / "names.json").read_text())
    whole = {name: changed[name] if name in changed else before.read(name) for name in names}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    for origin in (model, shipped):
        for file in origin.iterdir():
            if file.is_dir():
                shutil.copytree(file, folder / file.name)
            elif file.suffix != ".safetensors" and file.name not in {"names.json", "model.safetensors.index.json"}:
                shutil.copyfile(file, folder / file.name)


# Steps a second ------------------------------------------------------------------------------------------------------


def compare_steps(model: Path, rows: Path, device: str, scratch: Path) -> dict[str, float]:
    """Our loop and a plain one, by turns, on the same work: half the blocks, batches of 32 rows, logits and labels."""
    steps = 200 if device == "cuda" else 6
    options = {
        "pass": "distill",
        "student": {"layers": [0, 2, 4]},
        "logits": {"alpha": 0.5},
        "train": {**TRAIN, "steps": steps, "validation": 0},
    }
    recipe = parse_recipe({"name": "bench", "passes": [options], "exports": ["onnx"]})
    header = inspect_model(FolderFiles(model))
    ours, plain = [], []
    for turn in range(3):
        context = PassContext(
            header=header,
            work_dir=scratch / f"steps-{turn}",
            device=device,
            threads=torch.get_num_threads(),
            data_files={"train": rows},
        )
        record = MODEL_PASSES["distill"](model, scratch / f"steps-{turn}-out", recipe.passes[0], context)
        plain.append(plain_loop(model, rows, device, steps))
        ours.append(record.summary["steps_per_second"])
    # The first turn warms the device up for both.
    return {"ours": max(ours[1:]), "plain": max(plain[1:])}


def plain_loop(model: Path, rows: Path, device: str, steps: int) -> float:
    """Steps a second of what one writes first: transformers models, a shuffled DataLoader, AdamW, a linear schedule. Rows are tokenized before."""
    from torch.nn.utils.rnn import pad_sequence
    from torch.utils.data import DataLoader
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [json.loads(line) for line in _lines(rows)]
    tokens = tokenizer([one["text"] for one in texts], truncation=True, max_length=96)["input_ids"]
    examples = [(torch.tensor(ids), int(one["label"])) for ids, one in zip(tokens, texts, strict=True)]

    def together(batch: list[tuple[torch.Tensor, int]]) -> Any:
        ids = pad_sequence([one for one, _ in batch], batch_first=True, padding_value=tokenizer.pad_token_id)
        mask = pad_sequence([torch.ones_like(one) for one, _ in batch], batch_first=True)
        return ids, mask, torch.tensor([label for _, label in batch])

    loader = DataLoader(examples, batch_size=32, shuffle=True, drop_last=True, collate_fn=together)  # type: ignore[arg-type]
    teacher = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32).to(device).eval()
    student = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32).to(device).train()
    student.bert.encoder.layer = torch.nn.ModuleList(student.bert.encoder.layer[at] for at in (0, 2, 4))
    for module in student.modules():  # as ours does: the tables alone, not the norm behind them
        if isinstance(module, torch.nn.Embedding):
            module.requires_grad_(False)
    learned = [one for one in student.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-4)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    done, began = 0, time.perf_counter()
    while done < steps:
        for batch in loader:
            ids, mask, labels = (one.to(device) for one in batch)
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                with torch.no_grad():
                    answer = teacher(input_ids=ids, attention_mask=mask).logits
                logits = student(input_ids=ids, attention_mask=mask).logits
            soft = torch.nn.functional.kl_div(
                (logits.float() / 2).log_softmax(-1), (answer.float() / 2).softmax(-1), reduction="batchmean"
            )
            loss = 0.5 * 4 * soft + 0.5 * torch.nn.functional.cross_entropy(logits.float(), labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            done += 1
            if done == steps:
                break
    if device == "cuda":
        torch.cuda.synchronize()
    return steps / (time.perf_counter() - began)


if __name__ == "__main__":
    sys.exit(main())
