"""The smallest int8 classifier within a gate on accuracy, beside NNCF's accuracy control: same graph, rows, gate and rule.

    python -m bench.within MODEL DATA.jsonl --peer PYTHON [--drops 0.01 0.02] [--samples 1000] [--threads 2]

PYTHON: of an environment with bench/peer-nncf-requirements.txt. Both search on one half of DATA; the accuracy below comes from the other half.
A candidate keeps the gate if the lower end of the 95% interval of its relative change does. Both results are graphs for OpenVINO: their bytes,
and their latency by turns at 1 × 128 tokens. `ratio` is ours divided by the peer's. Seconds are those of calibration and search; tracing is in
neither.
"""

import gzip
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from bench.record import BENCH, Figure, finish, make_parser
from nightpress.core.compress.calibration.samples import calibration_samples
from nightpress.core.compress.context import PassContext
from nightpress.core.compress.evaluate import quality
from nightpress.core.compress.evaluate.statistics import RESAMPLES
from nightpress.core.compress.export import openvino
from nightpress.core.compress.export.consumer import Consumer, run_consumer, timed_rounds
from nightpress.core.compress.export.task import TimedShape
from nightpress.core.compress.graph import tracing
from nightpress.core.handoff.report import Report
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import Recipe, parse_recipe
from tests.press import lay_out, press

_SHAPE = TimedShape(1, 128, 60)
_CALIBRATION = {"samples": 64, "length": 64}


def main() -> int:
    parser = make_parser("within", __doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--peer", help="the Python of the peer's environment")
    parser.add_argument("--drops", type=float, nargs="+", default=[0.01, 0.02])
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    raw = options.data.read_bytes()
    rows = (gzip.decompress(raw) if options.data.suffix == ".gz" else raw).decode()
    figures: list[Figure] = []
    for drop in options.drops:
        with tempfile.TemporaryDirectory(prefix="nightpress-bench-") as work:
            figures += compare(options.model, rows, drop, options, Path(work))
    return finish("within", figures, parser, options, choices=("model", "data", "peer"))


def compare(model: Path, rows: str, drop: float, options: Any, work: Path) -> list[Figure]:
    """Measure both at one gate. drop: the accuracy that may be lost, as a share of the source's."""
    row = f"{model.name}, {drop:.1%} lost"
    raw = {
        "passes": [{"pass": "static-int8", "within": f"accuracy >= {-100 * drop:+g}%"}],
        "exports": ["openvino"],
        "calibration": _CALIBRATION,
        "evaluate": [{"metric": "accuracy", "data": "rows", "samples": options.samples, "length": 64}],
        "seed": 0,
    }
    job = lay_out(work / "job", model, raw, {"rows": rows}, threads=options.threads)
    _, report, _ = press(job)
    ours = job / "out" / "openvino"
    figures = [Figure(f"{row}/ours/seconds", round(report.passes[0].seconds, 1), "s"), *_of_search(row, report)]
    folders = {"ours": ours}
    if options.peer:
        recipe = parse_recipe({"name": "bench", **raw})
        told = run_peer(options.peer, model, recipe, job / "data" / "rows.jsonl", drop, options.threads, work / "peer")
        figures += [
            Figure(f"{row}/peer/seconds", round(told["seconds"], 1), "s"),
            Figure(f"{row}/peer/measured", told["measured"], "graphs"),
            Figure(f"{row}/seconds_ratio", round(report.passes[0].seconds / told["seconds"], 3)),
        ]
        folders["peer"] = work / "peer"
    return figures + side_by_side(row, folders, model, raw, job / "data" / "rows.jsonl", work)


def _of_search(row: str, report: Report) -> list[Figure]:
    found = report.passes[0].within
    assert found is not None
    return [
        Figure(f"{row}/ours/measured", len(found.tried), "graphs"),
        Figure(f"{row}/ours/in_float", len(report.passes[0].summary["left_in_float"]), "layers"),
        Figure(f"{row}/ours/kept", float(found.kept)),
    ]


def run_peer(
    python: str, model: Path, recipe: Recipe, data: Path, drop: float, threads: int, out: Path
) -> dict[str, Any]:
    """Let NNCF search on the same graph, calibration text and rows. Writes its graph to `out`."""
    out.mkdir()
    header = inspect_model(FolderFiles(model))
    trial = quality.prepare(recipe, header, model, {"rows": data}, threads=threads)
    context = PassContext(header=header, work_dir=out / "work", threads=threads, calibration=recipe.calibration)
    traced = tracing.trace(model, header, trial.task.sets[0].sequences, context)
    samples = {name: tensor.numpy() for name, tensor in calibration_samples(model, context).items()}
    [choose] = trial.choose
    sequences = choose.scorer.examples.sequences
    source = run_consumer(
        Path(openvino.CONSUMER),
        _as_openvino(model, traced, out / "source"),
        trial.only([choose]),
        name="s",
        scratch=out / "s",
    )
    labels = sequences.labels
    assert labels is not None
    values = source.outputs[f"{choose.scorer.examples.name}.values"]
    rng, count = np.random.default_rng(0), len(labels) + 2
    times = np.stack([np.bincount(rng.integers(0, count, count), minlength=count) for _ in range(RESAMPLES)])
    np.savez(
        out / "data.npz",
        calibration_ids=samples["input_ids"],
        calibration_mask=samples.get("attention_mask", np.ones_like(samples["input_ids"])),
        choose_ids=sequences.ids,
        choose_mask=sequences.mask,
        labels=labels,
        source_hits=(values.argmax(1) == labels).astype(np.float64),
        times=times.astype(np.float64),
    )
    command = [python, str(BENCH / "peer_nncf.py"), traced.path, out / "data.npz", str(drop), str(threads), out]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": ""}
    done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True, env=environment)
    told: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return told


def _as_openvino(model: Path, traced: tracing.Traced, folder: Path) -> Path:
    openvino.save(model, folder, traced, [])
    return folder


def side_by_side(
    row: str, folders: Mapping[str, Path], model: Path, raw: dict[str, Any], data: Path, work: Path
) -> list[Figure]:
    """Bytes of the graphs, accuracy on the half that judges, and latency by turns."""
    recipe, header = parse_recipe({"name": "bench", **raw}), inspect_model(FolderFiles(model))
    trial = quality.prepare(recipe, header, model, {"rows": data}, threads=2)
    [judged] = trial.evaluations
    labels = judged.scorer.examples.sequences.labels
    figures: list[Figure] = []
    size: dict[str, int] = {}
    with ExitStack() as stack:
        models = []
        for name, folder in folders.items():
            size[name] = sum(folder.joinpath(f"model.{kind}").stat().st_size for kind in ("xml", "bin"))
            figures.append(Figure(f"{row}/{name}/megabytes", round(size[name] / 1e6, 3), "MB"))
            consumer = Consumer(
                Path(openvino.CONSUMER), folder, trial.task.only_examples, name=name, scratch=work / f"run-{name}"
            )
            models.append(stack.enter_context(consumer))
            values = models[-1].run().outputs[f"{judged.scorer.examples.name}.values"]
            figures.append(Figure(f"{row}/{name}/accuracy", round(float((values.argmax(1) == labels).mean()), 4)))
        rounds = timed_rounds(_SHAPE, models, lambda _share: None)
    medians = {
        name: float(np.median([run["milliseconds"] for run in runs]))
        for name, runs in zip(folders, rounds, strict=True)
    }
    figures += [Figure(f"{row}/{name}/milliseconds", round(value, 3), "ms") for name, value in medians.items()]
    if "peer" in folders:
        figures += [
            Figure(f"{row}/size_ratio", round(size["ours"] / size["peer"], 4), bar="<= 1.0"),
            Figure(f"{row}/latency_ratio", round(medians["ours"] / medians["peer"], 4), bar="<= 1.0"),
        ]
    return figures


if __name__ == "__main__":
    sys.exit(main())
