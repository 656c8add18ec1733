"""all-MiniLM-L6-v2 as static int8, beside fp32 and beside ONNX Runtime's own static quantization as its documentation starts with.

    python -m bench.static_int8 [--model FOLDER] [--threads 2] [--rounds 3] [--json]

The pipeline presses the model; ONNX Runtime's `quantize_static` gets the same graph and calibration texts of the same length. Cosines are those
of mean-pooled outputs with the source's, over texts that neither saw. Forms are timed in fresh processes, in alternating order; ratios are
taken within each round. OpenVINO is left out where it isn't installed.
"""

import argparse
import json
import logging
import shutil
import statistics
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bench.machine import machine_of
from nightpress.core.compress import pipeline
from nightpress.core.compress.data.calibration import calibration_samples
from nightpress.core.compress.evaluate import quality, speed
from nightpress.core.compress.export import onnx, openvino, safetensors
from nightpress.core.compress.export.consumer import run_consumer
from nightpress.core.compress.graph import tracing
from nightpress.core.compress.passes import PassContext
from nightpress.core.handoff.report import Report
from nightpress.core.handoff.spec import JobSpec
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from tests.models import minilm_dir

RECIPE = {
    "name": "static-int8",
    "passes": [{"pass": "static-int8"}],
    "exports": ["onnx", "openvino"],
    "calibration": {"samples": 64, "length": 128},
    "evaluate": [
        {"metric": "fidelity", "samples": 64, "length": 128},
        {"metric": "latency", "batch": [1, 8], "length": 128},
    ],
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.static_int8", description=__doc__)
    parser.add_argument("--model", type=Path, help="an embedder's folder; default: all-MiniLM-L6-v2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nightpress-bench-") as folder:
        model = options.model or minilm_dir(Path(folder))
        found = measure(model, Path(folder), options.threads, options.rounds)
    if options.json:
        json.dump(found, sys.stdout, indent=1)
        print()
    else:
        show(found)
    return 0


def measure(model: Path, folder: Path, threads: int, rounds: int) -> dict[str, Any]:
    job = folder / "job"
    source = shutil.copytree(model, job / "source")
    has_openvino = find_spec("openvino") is not None
    recipe = parse_recipe(RECIPE | ({} if has_openvino else {"exports": ["onnx"]}))
    JobSpec(
        job_id="bench", attempt=1, model_name="all-MiniLM-L6-v2", model_digest="", recipe=recipe, threads=threads
    ).save(job)
    started = time.monotonic()
    pipeline.run(job, lambda _frame: None)
    seconds = time.monotonic() - started
    report = Report.model_validate_json((job / "out" / "report.json").read_bytes())

    header = inspect_model(FolderFiles(source))
    trial = quality.prepare(recipe, header, source, {}, threads=threads)
    # The job's own trace is found again in its work folder.
    context = PassContext(header=header, work_dir=job / "work", threads=threads, calibration=recipe.calibration)
    traced = tracing.trace(source, header, trial.task.sets[0].sequences, context)
    onnx.save(source, folder / "onnx-fp32", traced, [])
    if has_openvino:
        openvino.save(source, folder / "openvino-fp32", traced, [])
    shutil.copytree(folder / "onnx-fp32", folder / "onnx-naive")
    _naive(
        traced.path, folder / "onnx-naive" / onnx.GRAPH_FILE, calibration_samples(source, context)["input_ids"].numpy()
    )
    forms = {
        "torch fp32": (safetensors.CONSUMER, source),
        "onnx fp32": (onnx.CONSUMER, folder / "onnx-fp32"),
        "openvino fp32": (openvino.CONSUMER, folder / "openvino-fp32"),
        "onnx naive static": (onnx.CONSUMER, folder / "onnx-naive"),
        "onnx static-int8": (onnx.CONSUMER, job / "out" / "onnx"),
        "openvino static-int8": (openvino.CONSUMER, job / "out" / "openvino"),
    }
    forms = {name: form for name, form in forms.items() if has_openvino or form[0] != openvino.CONSUMER}
    times: dict[str, list[dict[str, float]]] = {name: [] for name in forms}
    cosines: dict[str, float] = {}
    for turn in range(rounds):
        order = list(forms.items())
        reference = None
        for name, (runner, artifact) in order if turn % 2 == 0 else reversed(order):
            seen = run_consumer(runner, artifact, trial.task, name=name, scratch=folder / "scratch")
            times[name].append({f"{one.batch}x{one.length}": one.p50_ms for one in speed.timings(seen, trial.task)})
            if turn == 0:
                reference = reference or seen
                (measured,) = quality.measurements(trial, reference, seen)
                cosines[name] = measured.value
    return {
        "environment": report.environment,
        "job_seconds": round(seconds, 1),
        "pass": report.passes[0].summary | {"seconds": round(report.passes[0].seconds, 1)},
        "forms": {
            name: {
                "size_mb": round(sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e6, 1),
                "cosine": round(cosines[name], 5),
                "p50_ms": _medians(times[name]),
                "over_torch_fp32": _medians(
                    [
                        {shape: theirs[shape] / ours[shape] for shape in ours}
                        for ours, theirs in zip(times[name], times["torch fp32"], strict=True)
                    ]
                ),
            }
            for name, (_, path) in forms.items()
        },
    }


def _naive(graph_file: Path, target: Path, ids: np.ndarray[Any, Any]) -> None:
    """Every default of ONNX Runtime's static quantization: all kinds of nodes, extremes, one scale a tensor."""
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    session = onnxruntime.InferenceSession(graph_file, providers=["CPUExecutionProvider"])
    inputs = {one.name for one in session.get_inputs()}

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._rows = iter(ids)

        def get_next(self) -> dict[str, Any] | None:
            row = next(self._rows, None)
            if row is None:
                return None
            feeds = {"input_ids": row[None], "attention_mask": np.ones_like(row[None])}
            feeds["token_type_ids"] = np.zeros_like(row[None])
            return {name: value for name, value in feeds.items() if name in inputs}

    logging.disable(logging.WARNING)
    quantize_static(graph_file, target, Reader())
    logging.disable(logging.NOTSET)


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {shape: round(statistics.median(one[shape] for one in rounds), 2) for shape in rounds[0]}


def show(found: dict[str, Any]) -> None:
    left = found["pass"]["left_in_float"]
    print(
        f"{machine_of(found['environment'])}. The job took {found['job_seconds']} s, the pass {found['pass']['seconds']} s."
    )
    print(
        f"{len(left)} of {found['pass']['matrices']} matrices left in float; weights in {found['pass']['weight_bits']} bits.\n"
    )
    shapes = list(next(iter(found["forms"].values()))["p50_ms"])
    print("| | MB | cosine |" + "".join(f" {shape}, ms | over torch |" for shape in shapes))
    print("|---|---|---|" + "---|---|" * len(shapes))
    for name, form in found["forms"].items():
        times = "".join(f" {form['p50_ms'][one]:.2f} | {form['over_torch_fp32'][one]:.2f}× |" for one in shapes)
        print(f"| {name} | {form['size_mb']:.1f} | {form['cosine']:.5f} |{times}")


if __name__ == "__main__":
    sys.exit(main())
