"""Measures the models of bench.train on this machine's CPU: accuracy on the test rows, and latency beside the source's, text by text."""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.train_steps import compare_steps
from bench.trained import accuracy, test_rows, unship
from nightpress.core.compress.context import PassContext
from nightpress.core.compress.data.examples import Examples
from nightpress.core.compress.data.tokenized import Sequences, pad
from nightpress.core.compress.export.early_exit import trace_exits
from nightpress.core.compress.graph import tracing
from nightpress.core.compress.model.exits import load_exits
from nightpress.core.compress.model.networks import load_model
from nightpress.core.compress.solvers.exits import choose, outcomes
from nightpress.core.processor import cpu_features, processor
from nightpress.core.recipes.inspect import FolderFiles, inspect_model

#: token ids [1, S] → the model's outputs
Run = Callable[[np.ndarray[Any, Any]], Any]
#: token ids [S] of each text
Texts = list[np.ndarray[Any, Any]]


def measure(
    model: Path, data: Path, shipped: Path, threads: int, rounds: int, texts: int, names: list[str]
) -> dict[str, Any]:
    """Measure the models `names` of the folder `shipped`. `texts`: number of test rows that are timed."""
    torch.set_num_threads(threads)
    test = test_rows(model, data / "rt_sentiment_test.jsonl.gz")
    found: dict[str, Any] = {
        "cpu": " ".join([processor(), *cpu_features()]),
        "threads": threads,
        "source_accuracy": accuracy(model, model, test),
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = _graph(model, model, folder / "source", threads)
        timed = list(test.ids[:: max(1, len(test) // texts)])
        for name in ("distill", "distill-rows-only", "prune"):
            if name in names and (shipped / name / "names.json").is_file():
                unship(model, shipped / name, folder / name)
                found[name] = _beside(model, folder / name, source, folder, test, timed, threads, rounds)
                found[name]["of_the_source"] = found[name]["accuracy"] / found["source_accuracy"]
                print(name, found[name], file=sys.stderr, flush=True)
        if "early-exit" in names and (shipped / "early-exit" / "names.json").is_file():
            unship(model, shipped / "early-exit", folder / "early-exit")
            base = found["source_accuracy"]
            found["early-exit"] = _exits(
                model, folder / "early-exit", source, base, folder, test, timed, threads, rounds
            )
        if "steps" in names:
            found["steps"] = compare_steps(model, data / "rt_sentiment_train.jsonl.gz", "cpu", folder)
    return found


def show(found: dict[str, Any]) -> None:
    """Print the figures as the tables of docs/results.md."""
    base = found["source_accuracy"]
    print(f"{found['cpu']}, {found['threads']} threads. Source: {base:.1%} of the test rows right.\n")
    print(
        "| | accuracy | of the source | ONNX Runtime, mean ms | faster | torch, mean ms | faster |\n|---|---|---|---|---|---|---|"
    )
    for name in ("distill", "distill-rows-only", "prune"):
        if row := found.get(name):
            graph, eager = row["onnxruntime"], row["torch"]
            print(
                f"| {name} | {row['accuracy']:.1%} | {row['of_the_source']:.1%} "
                f"| {graph['source_mean_ms']:.1f} → {graph['mean_ms']:.1f} | {graph['speedup']:.2f}× "
                f"| {eager['source_mean_ms']:.1f} → {eager['mean_ms']:.1f} | {eager['speedup']:.2f}× |"
            )
    if exits := found.get("early-exit"):
        print(
            "\n| early-exit at threshold | blocks run | accuracy | points lost | mean ms | p95 ms | faster |\n|---|---|---|---|---|---|---|"
        )
        for threshold in exits["thresholds"]:
            chosen = " (chosen)" if threshold["threshold"] == exits["at_chosen"]["threshold"] else ""
            print(
                f"| {threshold['threshold']:.4f}{chosen} | {threshold['depth']:.2f} | {threshold['accuracy']:.1%} | {100 * threshold['lost']:.1f} "
                f"| {threshold['source_mean_ms']:.1f} → {threshold['mean_ms']:.1f} | {threshold['source_p95_ms']:.1f} → {threshold['p95_ms']:.1f} | {threshold['speedup']:.2f}× |"
            )
        cross = exits["cross_chosen"]
        print(
            f"\nChosen on one half and counted on the other, both ways: {cross['depth']:.2f} blocks, {100 * cross['lost']:.1f} points lost."
        )
    if steps := found.get("steps"):
        print(f"\nSteps/s of distillation on this CPU: {steps['ours']:.2f}, of a plain loop {steps['plain']:.2f}.")


def _beside(
    model: Path, pressed: Path, source: Run, scratch: Path, test: Examples, timed: Texts, threads: int, rounds: int
) -> dict[str, Any]:
    ours = _graph(pressed, pressed, scratch / f"{pressed.name}-onnx", threads)
    kept = accuracy(pressed, pressed, test)
    return {
        "accuracy": kept,
        "onnxruntime": _ratio(source, ours, timed, rounds),
        "torch": _ratio(_eager(model), _eager(pressed), timed, rounds),
    }


def _exits(
    model: Path,
    pressed: Path,
    source: Run,
    baseline: float,
    scratch: Path,
    test: Examples,
    timed: Texts,
    threads: int,
    rounds: int,
) -> dict[str, Any]:
    """Measure early exits. A threshold is chosen on one half of the test rows and evaluated on the other half, in both directions."""
    header = inspect_model(FolderFiles(model))
    module, plan = load_exits(pressed, header)
    scores, right = [], []
    with torch.inference_mode():
        for ids in test.ids:
            heads = module(torch.from_numpy(ids)[None], torch.ones(1, len(ids), dtype=torch.int64))
            label = test.labels[len(right)] if test.labels is not None else 0
            scores.append([float(score) for score in heads.scores])
            right.append([bool(logit.argmax() == label) for logit in heads.logits])
    every, hits, depths = np.asarray(scores).T, np.asarray(right).T, np.asarray(plan.depths)
    halves = np.arange(len(test)) % 2
    counted = {"depth": 0.0, "accuracy": 0.0}
    picked = []
    for half in (0, 1):
        chosen = choose(outcomes(every[:, halves == half], hits[:, halves == half], depths), 0.01)
        other = _at(every[:, halves != half], hits[:, halves != half], depths, chosen.threshold)
        counted["depth"] += other[0] / 2
        counted["accuracy"] += other[1] / 2
        picked.append(chosen.threshold)
    context = PassContext(header=header, work_dir=scratch / "exits", threads=threads)
    context.work_dir.mkdir(parents=True, exist_ok=True)
    check = _check(test)
    session = _session(trace_exits(pressed, header, check, context).path, threads)
    levels = sorted(
        {float(np.mean(picked)), *np.quantile(every, [0.1, 0.3, 0.5, 0.7, 0.9]).tolist(), float(every.max()) + 1}
    )
    rows = []
    for threshold in levels:
        depth, kept = _at(every, hits, depths, threshold)
        early = _with_threshold(session, threshold)
        rows.append(
            {"threshold": threshold, "depth": depth, "accuracy": kept, "lost": baseline - kept}
            | _ratio(source, early, timed, rounds if threshold == float(np.mean(picked)) else 1)
        )
    return {
        "source_accuracy": baseline,
        "cross_chosen": counted | {"thresholds": picked, "lost": baseline - counted["accuracy"]},
        "at_chosen": next(row for row in rows if row["threshold"] == float(np.mean(picked))),
        "thresholds": rows,
    }


def _at(scores: Any, right: Any, depths: Any, threshold: float) -> tuple[float, float]:
    from nightpress.core.compress.solvers.exits import exit_outcome

    found = exit_outcome(scores, right, depths, threshold)
    return found.depth, found.accuracy


def _ratio(source: Run, ours: Run, timed: Texts, rounds: int) -> dict[str, float]:
    """Milliseconds per text; both sides run in turns on the same text. `speedup`: the median over rounds of the ratio of means."""
    texts = [row[None] for row in timed]
    for run in (source, ours):
        for text in texts[:10]:
            run(text)
    ratios, sides = [], ([], [])
    for _ in range(rounds):
        taken: tuple[list[float], list[float]] = ([], [])
        for at, text in enumerate(texts):
            for side in (0, 1) if at % 2 else (1, 0):
                began = time.perf_counter()
                (source, ours)[side](text)
                taken[side].append(1000 * (time.perf_counter() - began))
        ratios.append(np.mean(taken[0]) / np.mean(taken[1]))
        for side in (0, 1):
            sides[side].extend(taken[side])
    return {
        "speedup": round(float(np.median(ratios)), 3),
        "source_mean_ms": round(float(np.mean(sides[0])), 3),
        "mean_ms": round(float(np.mean(sides[1])), 3),
        "p50_ms": round(float(np.percentile(sides[1], 50)), 3),
        "p95_ms": round(float(np.percentile(sides[1], 95)), 3),
        "source_p95_ms": round(float(np.percentile(sides[0], 95)), 3),
    }


def _check(test: Examples) -> Sequences:
    return pad([row.tolist() for row in test.ids[:4]], test.pad_id)


def _graph(folder: Path, header_of: Path, scratch: Path, threads: int) -> Run:
    header = inspect_model(FolderFiles(header_of))
    scratch.mkdir(parents=True, exist_ok=True)
    ids = pad([list(range(1000, 1012)), list(range(1000, 1007))], 0)
    traced = tracing.trace(folder, header, ids, PassContext(header=header, work_dir=scratch, threads=threads))
    session = _session(traced.path, threads)
    return lambda text: session.run(None, _feeds(text))


def _session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _with_threshold(session: Any, threshold: float) -> Run:
    given = {"threshold": np.asarray(threshold, np.float32)}
    return lambda text: session.run(None, {**_feeds(text), **given})


def _feeds(text: np.ndarray[Any, Any]) -> dict[str, Any]:
    return {"input_ids": text, "attention_mask": np.ones_like(text), "token_type_ids": np.zeros_like(text)}


def _eager(folder: Path) -> Run:
    model = load_model(folder, inspect_model(FolderFiles(folder)))

    def run(text: np.ndarray[Any, Any]) -> Any:
        with torch.inference_mode():
            return model(
                input_ids=torch.from_numpy(text), attention_mask=torch.ones(text.shape, dtype=torch.int64)
            ).logits

    return run
