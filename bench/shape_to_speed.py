"""A classifier at 2, 4 and 8 times the speed by `shape-to-speed`, beside plain distillation to fewer layers at the same speed.

    python -m bench.shape_to_speed MODEL DATA --table FILE                              measures the table of times here, on --threads cores
    python -m bench.shape_to_speed MODEL DATA --table FILE --press OUT [--device cuda]  trains by that table; writes the models to OUT
    python -m bench.shape_to_speed MODEL DATA --table FILE --measure OUT                measures them here, in int8, on --threads cores

MODEL is the folder of a classifier. DATA is a folder with rt_sentiment_train.jsonl.gz, rt_sentiment_test.jsonl.gz and, for texts without
labels, lm_train_austen_moby.txt.gz. The table is of --runtime with static int8. A model with fewer layers has as many as the table allows at
that speed, and gets as many training steps as the shaped model of that speed. Speeds are those over the source in the faster of OpenVINO and
ONNX Runtime in float, by turns at 1 × 128 tokens. Accuracy is that on all test rows; its change has a 95% interval of paired differences.
"""

import io
import json
import sys
import tarfile
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.record import Figure, finish, make_parser
from bench.train import data_files
from bench.trained import accuracy, ship, test_rows, unship
from nightpress.core.compress.context import PassContext
from nightpress.core.compress.data.examples import Examples, collate
from nightpress.core.compress.passes import MODEL_PASSES
from nightpress.core.compress.passes.latency_table import LatencyTable, latency_table
from nightpress.core.compress.passes.shape import shape_to_speed_with
from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.depth import evenly
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.passes import Distill, ShapeToSpeed, StaticInt8

SPEEDS = (2.0, 4.0, 8.0)
_TRAIN = {"length": 96, "batch": 64, "validation": 0.05, "precision": "auto"}
_LOSSES = {"logits": {"alpha": 0.7}, "hidden": {"weight": 1.0}}
_BARS = {4.0: -0.010, 8.0: -0.020}  #: speed → the largest loss of accuracy
_RUNTIMES = ("onnx", "openvino")
_PART = 15_000_000  #: bytes of a file of OUT


#: (model, runtime) → milliseconds of each round
Times = Mapping[tuple[str, str], NDArray[np.float64]]


def main() -> int:
    parser = make_parser("shape_to_speed", __doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--press", type=Path)
    parser.add_argument("--measure", type=Path)
    parser.add_argument("--only", nargs="+", choices=["shape", "layers"], default=["shape", "layers"])
    parser.add_argument("--epochs", type=int, default=6, help="passes over the rows after each step to a speed")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--runtime", choices=["openvino", "onnxruntime"], default="openvino")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    if given.press is not None:
        return press(given)
    if given.measure is None:
        write_table(given)
        return 0
    choices = ("model", "data", "table", "measure", "only", "device")
    return finish("shape_to_speed", measure(given), parser, given, choices=choices)


def options_of(given: Namespace) -> ShapeToSpeed:
    train = {**_TRAIN, "data": "train", "epochs": given.epochs, "learning_rate": given.learning_rate}
    return ShapeToSpeed.model_validate(
        {
            "pass": "shape-to-speed",
            "speeds": SPEEDS,
            "runtime": given.runtime,
            "type": "int8",
            "train": train,
            **_LOSSES,
        }
    )


def write_table(given: Namespace) -> None:
    """Measure the table on this machine."""
    from nightpress.core.compress.stages.stopwatch import GraphStopwatch

    options, header = options_of(given), inspect_model(FolderFiles(given.model))
    with tempfile.TemporaryDirectory(prefix="nightpress-bench-") as work:
        stopwatch = GraphStopwatch(given.model, Path(work) / "timed", given.threads)
        context = PassContext(
            header=header,
            work_dir=Path(work),
            threads=given.threads,
            stopwatch=stopwatch,
            progress=lambda share, text: print(f"{share:4.0%} {text}", file=sys.stderr, flush=True),
        )
        table = latency_table(given.model, options, options.anatomy(header), context)
    given.table.write_text(table.to_json())
    print(table.to_json())


# Training -----------------------------------------------------------------------------------------------------------------


def press(given: Namespace) -> int:
    """Train the models and pack them into OUT, with what was told of each in OUT/<kind>.json."""
    given.press.mkdir(parents=True, exist_ok=True)
    table = LatencyTable.from_json(given.table.read_text())
    with tempfile.TemporaryDirectory(prefix="nightpress-bench-") as scratch:
        files = data_files(given.data, Path(scratch))
        test = test_rows(given.model, files["test"])
        for kind in given.only:
            start = time.monotonic()
            folders, told = (_shaped if kind == "shape" else _cut)(given, table, files, Path(scratch) / kind)
            told |= {"seconds": round(time.monotonic() - start, 1), "epochs": given.epochs}
            told["accuracy"] = {
                speed: accuracy(folder, given.model, test, given.device) for speed, folder in folders.items()
            }
            print(json.dumps({key: told[key] for key in ("accuracy", "seconds")}), flush=True)
            (given.press / f"{kind}.json").write_text(json.dumps(told, indent=1))
            for speed, folder in folders.items():
                _pack(given.model, folder, given.press, f"{kind}-{speed:g}x")
    return 0


def _context(given: Namespace, files: Mapping[str, Path], work: Path) -> PassContext:
    work.mkdir(parents=True, exist_ok=True)
    return PassContext(
        header=inspect_model(FolderFiles(given.model)),
        work_dir=work,
        device=given.device,
        threads=torch.get_num_threads(),
        data_files=files,
        progress=_telling(),
    )


def _telling() -> Callable[[float, str], None]:
    said = [0.0]

    def tell(share: float, text: str) -> None:
        if time.monotonic() - said[0] > 20:
            said[0] = time.monotonic()
            print(f"{share:4.0%} {text}", file=sys.stderr, flush=True)

    return tell


def _shaped(
    given: Namespace, table: LatencyTable, files: Mapping[str, Path], work: Path
) -> tuple[dict[float, Path], dict[str, Any]]:
    from nightpress.core.compress.model.companions import family_member

    out = work / "out"
    record = shape_to_speed_with(given.model, out, options_of(given), _context(given, files, work / "work"), table)
    folders = {speed: out if speed == SPEEDS[-1] else family_member(out, speed) for speed in SPEEDS}
    return folders, {"stages": record.summary["stages"]}


def _cut(
    given: Namespace, table: LatencyTable, files: Mapping[str, Path], work: Path
) -> tuple[dict[float, Path], dict[str, Any]]:
    """Distil to as many layers as the table allows at each speed: to half as many at a time, as the shaped model gets there."""
    header = inspect_model(FolderFiles(given.model))
    anatomy = options_of(given).anatomy(header)
    folders, told, layers = {}, {}, {}
    for at, speed in enumerate(SPEEDS):
        fitting = (
            count
            for count in range(anatomy.layers, 0, -1)
            if table.speed([max(anatomy.groups)] * count, [max(anatomy.widths)] * count) >= speed
        )
        layers[speed] = next(fitting, 1)
        kept = evenly(layers[speed], anatomy.layers)
        train = {**_TRAIN, "data": "train", "epochs": (at + 1) * given.epochs, "learning_rate": given.learning_rate}
        options = Distill.model_validate({"pass": "distill", "student": {"layers": kept}, "train": train, **_LOSSES})
        if layers[speed] == anatomy.layers:  # no layer need go: int8 alone is fast enough
            folders[speed] = given.model
        else:
            folders[speed] = work / f"out-{speed:g}"
            MODEL_PASSES["distill"](
                given.model, folders[speed], options, _context(given, files, work / f"work-{speed:g}")
            )
        told[speed] = {"layers": layers[speed], "epochs": train["epochs"]}
    return folders, {"models": told}


def _pack(model: Path, folder: Path, out: Path, name: str) -> None:
    """Write what differs from the source's files to OUT/name.tar.0 and so on, each small enough to be carried."""
    with tempfile.TemporaryDirectory() as scratch:
        ship(model, folder, Path(scratch))
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for file in sorted(Path(scratch).iterdir()):
                archive.add(file, file.name)
    whole = packed.getvalue()
    for at, start in enumerate(range(0, len(whole), _PART)):
        (out / f"{name}.tar.{at}").write_bytes(whole[start : start + _PART])


def _unpack(model: Path, out: Path, name: str, folder: Path) -> None:
    parts = sorted(out.glob(f"{name}.tar.*"))
    with tempfile.TemporaryDirectory() as scratch:
        with tarfile.open(fileobj=io.BytesIO(b"".join(part.read_bytes() for part in parts))) as archive:
            archive.extractall(scratch, filter="data")
        unship(model, Path(scratch), folder)


# Measuring ----------------------------------------------------------------------------------------------------------------


def measure(given: Namespace) -> list[Figure]:
    """Export each model in static int8, and compare it with the source in float."""
    table = LatencyTable.from_json(given.table.read_text())
    with tempfile.TemporaryDirectory(prefix="nightpress-bench-") as work:
        files = data_files(given.data, Path(work))
        test = test_rows(given.model, files["test"])
        names = [
            f"{kind}-{speed:g}x"
            for kind in given.only
            for speed in SPEEDS
            if list(given.measure.glob(f"{kind}-{speed:g}x.tar.*"))
        ]
        folders = {"source": _graphs(given, given.model, files, Path(work) / "source", int8=False)}
        for name in names:
            _unpack(given.model, given.measure, name, Path(work) / name / "model")
            folders[name] = _graphs(given, Path(work) / name / "model", files, Path(work) / name, int8=True)
        folders["source int8"] = _graphs(given, given.model, files, Path(work) / "int8", int8=True)
        right = {name: _right(forms["onnx"] / "model.onnx", test, given.threads) for name, forms in folders.items()}
        times = _times(given, folders, Path(work) / "times")
    return _figures(given, table, right, times)


def _graphs(given: Namespace, model: Path, files: Mapping[str, Path], work: Path, *, int8: bool) -> dict[str, Path]:
    """Format → the folder of the model's graph."""
    from nightpress.core.compress.data.tokenized import Sequences
    from nightpress.core.compress.export import onnx, openvino
    from nightpress.core.compress.graph import modules, tracing
    from nightpress.core.compress.passes.registry import GRAPH_PASSES

    header = inspect_model(FolderFiles(model))
    ids = modules.example_ids(header).numpy()
    calibration = Calibration(data="train", samples=128, length=64)
    context = replace(
        _context(given, files, work / "work"),
        header=header,
        device="cpu",
        threads=given.threads,
        calibration=calibration,
    )
    traced = tracing.trace(model, header, Sequences(ids, np.ones_like(ids)), context)
    if int8:
        traced, _ = GRAPH_PASSES["static-int8"](model, traced, StaticInt8(min_cosine=None), context)
    folders = {"onnx": work / "onnx", "openvino": work / "openvino"}
    onnx.save(model, folders["onnx"], traced, [])
    openvino.save(model, folders["openvino"], traced, [])
    return folders


def _right(graph: Path, test: Examples, threads: int) -> NDArray[np.float64]:
    """1 for each test row that is classified correctly in ONNX Runtime, else 0."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])
    wanted = {value.name for value in session.get_inputs()}
    found = []
    for at in range(len(test)):
        batch = collate(test, np.asarray([at]), torch.device("cpu"))
        feeds = {"input_ids": batch.ids, "attention_mask": batch.mask, "token_type_ids": torch.zeros_like(batch.ids)}
        (logits,) = session.run(None, {name: feeds[name].numpy() for name in wanted})
        assert batch.labels is not None
        found.append(float(logits.argmax(-1)[0] == int(batch.labels[0])))
    return np.asarray(found)


def _times(given: Namespace, folders: Mapping[str, Mapping[str, Path]], work: Path) -> Times:
    """Time all forms by turns."""
    import contextlib

    from nightpress.core.compress.export import onnx, openvino
    from nightpress.core.compress.export.consumer import Consumer, timed_rounds
    from nightpress.core.compress.export.task import Task, TimedShape

    options = options_of(given)
    shape = TimedShape(options.batch, options.length, 20 * given.rounds)
    ids = 1000 + np.arange(options.length)
    task = Task("classification", "AutoModelForSequenceClassification", (), (shape,), ids, "mean", 2, given.threads)
    runners = {"onnx": onnx.CONSUMER, "openvino": openvino.CONSUMER}
    forms = [(name, runtime) for name, made in folders.items() for runtime in made]
    with contextlib.ExitStack() as stack:
        consumers = []
        for at, (name, runtime) in enumerate(forms):
            opened = Consumer(Path(runners[runtime]), folders[name][runtime], task, name=f"form-{at}", scratch=work)
            consumers.append(stack.enter_context(opened))
        for consumer in consumers:
            consumer.run()
        rounds = timed_rounds(shape, consumers, lambda _share: None)
    return {form: np.asarray([run["milliseconds"] for run in runs]) for form, runs in zip(forms, rounds, strict=True)}


def _faster(times: Times, base: tuple[str, str], form: tuple[str, str]) -> float:
    """How many times as fast a form is: the median of the ratios within rounds."""
    return float(np.median(times[base] / times[form]))


def _figures(
    given: Namespace,
    table: LatencyTable,
    right: Mapping[str, NDArray[np.float64]],
    times: Times,
) -> list[Figure]:
    best = min((("source", runtime) for runtime in _RUNTIMES), key=lambda form: float(np.median(times[form])))
    own = {"onnxruntime": "onnx"}.get(given.runtime, given.runtime)
    stages = {}
    if (told := given.measure / "shape.json").is_file():
        stages = {stage["speed"]: stage for stage in json.loads(told.read_text())["stages"]}
    figures = []
    for name, hits in right.items():
        change = hits - right["source"]
        half = 1.96 * float(change.std(ddof=1)) / len(change) ** 0.5
        kind, _, speed = name.partition("-")
        asked = float(speed.removesuffix("x")) if speed else 0.0
        bars = _BARS if kind == "shape" else {}
        mean = float(change.mean())
        figures.append(Figure(f"models/{name}/accuracy", round(float(hits.mean()), 4)))
        figures.append(
            Figure(
                f"models/{name}/change",
                round(mean, 4),
                "",
                (round(mean - half, 4), round(mean + half, 4)),
                bar=f">= {bars[asked]}" if asked in bars else "",
            )
        )
        figures += [
            Figure(f"models/{name}/{runtime}", round(float(np.median(times[name, runtime])), 3), "ms")
            for runtime in _RUNTIMES
        ]
        fastest = max(_faster(times, best, (name, runtime)) for runtime in _RUNTIMES)
        figures.append(
            Figure(
                f"models/{name}/faster",
                round(fastest, 2),
                "× the best in float",
                bar=f">= {asked}" if asked in bars else "",
            )
        )
        if kind == "shape" and asked in stages:
            estimated, measured = stages[asked]["estimated_speed"], _faster(times, ("source", own), (name, own))
            figures += [
                Figure(f"models/{name}/estimated", estimated, f"× the source in {given.runtime}"),
                Figure(f"models/{name}/measured", round(measured, 3), f"× the source in {given.runtime}"),
                Figure(f"models/{name}/off", round(abs(estimated / measured - 1), 3), "of the measured", bar="<= 0.1"),
            ]
    figures.append(Figure("table/whole", round(table.source / table.whole, 3), "× in int8, nothing removed"))
    return figures


if __name__ == "__main__":
    sys.exit(main())
