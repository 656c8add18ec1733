"""all-MiniLM-L6-v2 as dynamic int8, beside itself in fp32: latency, fidelity, size.

    python -m bench.encoder [--threads 2] [--rounds 3] [--json]

The built-in recipe `int8-encoder` is pressed by the pipeline. Then each form is timed in fresh processes, in alternating order, so that a
noisy machine is noisy to all of them; each ratio is the median over rounds. The references: fp32 in eager torch, and the faster of the
fp32 graphs in ONNX Runtime and OpenVINO, which is what a careful person would have used instead.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from nightpress.core.compress import pipeline
from nightpress.core.compress.evaluate import quality, speed
from nightpress.core.compress.export import onnx, openvino, safetensors
from nightpress.core.compress.export.consumer import run_consumer
from nightpress.core.compress.graph import tracing
from nightpress.core.compress.passes import PassContext
from nightpress.core.handoff.report import Report
from nightpress.core.handoff.spec import JobSpec
from nightpress.core.recipes.builtins import get_recipe
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from tests.models import minilm_dir


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.encoder", description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nightpress-bench-") as folder:
        found = measure(Path(folder), options.threads, options.rounds)
    if options.json:
        json.dump(found, sys.stdout, indent=1)
        print()
    else:
        show(found)
    return 0


def measure(folder: Path, threads: int, rounds: int) -> dict[str, Any]:
    job = folder / "job"
    shutil.copytree(minilm_dir(folder), job / "source")
    recipe = get_recipe("int8-encoder")
    spec = JobSpec(
        job_id="bench", attempt=1, model_name="all-MiniLM-L6-v2", model_digest="", recipe=recipe, threads=threads
    )
    spec.save(job)
    started = time.monotonic()
    pipeline.run(job, lambda _frame: None)
    seconds = time.monotonic() - started
    report = Report.model_validate_json((job / "out" / "report.json").read_bytes())

    header = inspect_model(FolderFiles(job / "source"))
    trial = quality.prepare(recipe, header, job / "source", {}, threads=threads)
    # The job's own trace is found again in its work folder.
    context = PassContext(header=header, work_dir=job / "work", threads=threads)
    traced = tracing.trace(job / "source", header, trial.task.sets[0].sequences, context)
    onnx.save(job / "source", folder / "onnx-fp32", traced, [])
    openvino.save(job / "source", folder / "openvino-fp32", traced, [])
    forms = {
        "torch fp32": (safetensors.CONSUMER, job / "source"),
        "onnx fp32": (onnx.CONSUMER, folder / "onnx-fp32"),
        "openvino fp32": (openvino.CONSUMER, folder / "openvino-fp32"),
        "onnx int8": (onnx.CONSUMER, job / "out" / "onnx"),
        "openvino int8": (openvino.CONSUMER, job / "out" / "openvino"),
    }
    times: dict[str, list[dict[str, float]]] = {name: [] for name in forms}
    for turn in range(rounds):
        order = list(forms.items())
        for name, (runner, artifact) in order if turn % 2 == 0 else reversed(order):
            seen = run_consumer(runner, artifact, trial.task, name=name, scratch=folder / "scratch")
            times[name].append({f"{one.batch}x{one.length}": one.p50_ms for one in speed.timings(seen, trial.task)})
    shapes = list(times["torch fp32"][0])
    return {
        "environment": report.environment,
        "job_seconds": round(seconds, 1),
        "phases": report.phases,
        "forms": {
            name: {
                "size_mb": round(sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e6, 1),
                "p50_ms": {shape: round(statistics.median(one[shape] for one in times[name]), 2) for shape in shapes},
            }
            for name, (_, path) in forms.items()
        },
        "cosine": {
            one.name: {"mean": measured.value, "low": measured.low, "high": measured.high}
            for one in report.artifacts
            for measured in one.measurements
        },
        "speedup": {name: _speedup(times, name, shapes) for name in ("onnx int8", "openvino int8")},
    }


def _speedup(times: dict[str, list[dict[str, float]]], name: str, shapes: list[str]) -> dict[str, dict[str, float]]:
    """Ratios taken within each round, so that both sides saw the same machine."""
    found: dict[str, dict[str, float]] = {"over eager torch": {}, "over the best fp32 runtime": {}}
    for shape in shapes:
        rounds = range(len(times[name]))
        eager = [times["torch fp32"][at][shape] / times[name][at][shape] for at in rounds]
        best = [
            min(times[form][at][shape] for form in ("torch fp32", "onnx fp32", "openvino fp32"))
            / times[name][at][shape]
            for at in rounds
        ]
        found["over eager torch"][shape] = round(statistics.median(eager), 2)
        found["over the best fp32 runtime"][shape] = round(statistics.median(best), 2)
    return found


def show(found: dict[str, Any]) -> None:
    print(
        f"{found['environment']['cpu']} {found['environment']['cpu_features']}, {found['environment']['threads']} threads"
    )
    print(f"the whole job: {found['job_seconds']} s {found['phases']}")
    for name, form in found["forms"].items():
        print(
            f"{name:14} {form['size_mb']:7.1f} MB  " + "  ".join(f"{k} {v:8.2f} ms" for k, v in form["p50_ms"].items())
        )
    for name, ratios in found["speedup"].items():
        print(f"{name:14} " + "; ".join(f"{what} {values}" for what, values in ratios.items()))
    for name, cosine in found["cosine"].items():
        print(f"{name:14} cosine {cosine['mean']:.5f} [{cosine['low']:.5f}, {cosine['high']:.5f}]")


if __name__ == "__main__":
    sys.exit(main())
