"""A quarter of all feed-forward channels and attention heads taken out of a real encoder, beside the whole one: latency, fidelity, size.

    python -m bench.shrink [--threads 2] [--rounds 3] [--json]

all-MiniLM-L6-v2 is pressed by the pipeline without any training. Each form is then timed in fresh processes, the whole and the smaller one
of each runtime by turns, so that a noisy machine is noisy to both; each ratio is the median over rounds, of one runtime with itself.
Beside the calibrated choice stand the same shares by weight norms and by gradients.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.machine import machine_of
from nightpress.core.compress import pipeline
from nightpress.core.compress.evaluate import quality, speed
from nightpress.core.compress.export import onnx, openvino
from nightpress.core.compress.export.consumer import run_consumer
from nightpress.core.compress.graph import tracing
from nightpress.core.compress.passes import PassContext
from nightpress.core.handoff.report import read_report
from nightpress.core.handoff.spec import JobSpec
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from tests.models import minilm_dir

WAYS: dict[str, dict[str, Any]] = {
    "activation": {},
    "activation, not compensated": {"compensate": False},
    "l2": {"importance": "l2"},
    "taylor": {"importance": "taylor"},
    "activation, global": {"across": "global"},
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.shrink", description=__doc__)
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
    source = minilm_dir(folder)
    reports = {name: press(folder / str(at), source, way, threads) for at, (name, way) in enumerate(WAYS.items())}
    first = reports["activation"]
    return {
        "environment": first.environment,
        "parameters": [first.source.parameters, first.artifacts[0].parameters],
        "cosine": {name: one.artifacts[0].measurements[0].value for name, one in reports.items()},
        "seconds": {name: sum(record.seconds for record in one.passes) for name, one in reports.items()},
        "speedup": speedups(folder, source, threads, rounds),
    }


def recipe_of(way: dict[str, Any]) -> dict[str, Any]:
    """The first way's result is timed, so it alone is exported twice."""
    timed = not way
    fidelity = {"metric": "fidelity", "samples": 64, "length": 128}
    latency = {"metric": "latency", "batch": [1, 8], "length": [128], "repeats": 20}
    return {
        "name": "shrink",
        "passes": [{"pass": "channels", **way}, {"pass": "heads", **way}],
        "exports": ["onnx", "openvino"] if timed else ["onnx"],
        "calibration": {"samples": 64, "length": 128},
        "evaluate": [fidelity, latency] if timed else [fidelity],
    }


def press(job: Path, source: Path, way: dict[str, Any], threads: int) -> Any:
    shutil.copytree(source, job / "source")
    spec = JobSpec(
        job_id="bench",
        attempt=1,
        model_name="all-MiniLM-L6-v2",
        model_digest="",
        recipe=parse_recipe(recipe_of(way)),
        threads=threads,
    )
    spec.save(job)
    pipeline.run(job, lambda _frame: None)
    return read_report((job / "out" / "report.json").read_bytes())


def speedups(folder: Path, source: Path, threads: int, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """The calibrated result of the first job against the whole model in the same runtime, and against eager torch."""
    header = inspect_model(FolderFiles(source))
    recipe = parse_recipe(recipe_of({}))
    trial = quality.prepare(recipe, header, source, {}, threads=threads)
    context = PassContext(header=header, work_dir=folder / "whole", threads=threads)
    traced = tracing.trace(source, header, trial.task.sets[0].sequences, context)
    found = {}
    for name, exporter in {"onnx": onnx, "openvino": openvino}.items():
        exporter.save(source, folder / f"{name}-whole", traced, [])
        forms = {"whole": folder / f"{name}-whole", "smaller": folder / "0" / "out" / name}
        times: dict[str, list[dict[str, float]]] = {form: [] for form in forms}
        for turn in range(rounds):
            order = list(forms.items())
            for form, path in order if turn % 2 == 0 else reversed(order):
                seen = run_consumer(exporter.CONSUMER, path, trial.task, name=form, scratch=folder / "scratch" / name)
                taken = speed.timings(seen, trial.task)
                times[form].append({f"{one.batch}x{one.length}": one.p50_ms for one in taken})
        found[name] = {
            shape: {
                "whole_ms": statistics.median(one[shape] for one in times["whole"]),
                "smaller_ms": statistics.median(one[shape] for one in times["smaller"]),
                "speedup": statistics.median(
                    whole[shape] / smaller[shape]
                    for whole, smaller in zip(times["whole"], times["smaller"], strict=True)
                ),
            }
            for shape in times["whole"][0]
        }
    return found


def show(found: dict[str, Any]) -> None:
    before, after = found["parameters"]
    print(f"{machine_of(found['environment'])}; {before:,} → {after:,} parameters\n")
    print("| chosen by | cosine, untrained | seconds |\n|---|---|---|")
    for name, value in found["cosine"].items():
        print(f"| {name} | {value:.4f} | {found['seconds'][name]:.1f} |")
    print("\n| runtime | batch × tokens | whole, ms | smaller, ms | faster |\n|---|---|---|---|---|")
    for name, shapes in found["speedup"].items():
        for shape, one in shapes.items():
            print(f"| {name} | {shape} | {one['whole_ms']:.2f} | {one['smaller_ms']:.2f} | {one['speedup']:.2f}× |")


if __name__ == "__main__":
    sys.exit(main())
