"""Measures the models of bench.shape_to_speed on this machine: the quality and speed of their graphs, beside the source's in float."""

import contextlib
import tempfile
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bench.pressing import where
from bench.record import Figure
from bench.shape_kinds import KINDS, Answer, Array, Qualities
from bench.shape_press import Times, base_of, changes, options_of, unpacked
from nightpress.core.compress.context import PassContext
from nightpress.core.compress.data.examples import Batch
from nightpress.core.compress.data.tokenized import Sequences
from nightpress.core.compress.export import onnx, openvino
from nightpress.core.compress.export.consumer import Consumer, timed_rounds
from nightpress.core.compress.export.task import Task, TimedShape
from nightpress.core.compress.graph import modules, tracing
from nightpress.core.compress.model.networks import load_model
from nightpress.core.compress.passes.registry import GRAPH_PASSES
from nightpress.core.compress.passes.shape import shape_of
from nightpress.core.recipes.anatomy import OWN_SHAPES
from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.passes import StaticInt8

RUNTIMES = {"onnx": onnx, "openvino": openvino}
_NAMES = {"onnxruntime": "onnx", "openvino": "openvino"}

#: (model, runtime) → milliseconds of each round
Rounds = Mapping[tuple[str, str], Array]


def measure(given: Namespace) -> list[Figure]:
    kind = KINDS[given.kind]
    table = Times.read(given.table).table
    with tempfile.TemporaryDirectory(prefix="nightpress-bench-") as scratch:
        work = Path(scratch)
        files = kind.files(given.data, work)
        base = base_of(given, work)
        models, _ = unpacked(given, base, work / "models")
        source = models.pop("source", base)
        folders = {"source": graphs(given, source, files, work / "source", int8=False)}
        folders["source int8"] = graphs(given, source, files, work / "int8", int8=True)
        for name, model in sorted(models.items()):
            folders[name] = graphs(given, model, files, work / name, int8=given.type == "int8")
        estimates = {name: _estimated(given, model) for name, model in models.items()}
        form = _NAMES[given.runtime]
        found = {
            name: kind.quality(source, files, in_onnx(forms["onnx"] / "model.onnx", given.threads), torch.device("cpu"))
            for name, forms in folders.items()
        }
        rounds = timed(given, folders, work / "times")
    return [
        *(figure for name in folders for figure in _of_model(given, name, found, rounds, estimates.get(name), form)),
        Figure(f"table{where()}/whole", round(table.source / table.whole, 3), "× in int8, nothing removed"),
    ]


def graphs(given: Namespace, model: Path, files: Mapping[str, Path], work: Path, *, int8: bool) -> dict[str, Path]:
    """Runtime → the folder of the model's graph."""
    header = inspect_model(FolderFiles(model))
    ids = modules.example_ids(header).numpy()
    work.mkdir(parents=True, exist_ok=True)
    context = PassContext(
        header=header,
        work_dir=work,
        threads=given.threads,
        data_files=files,
        calibration=Calibration(data="train", samples=128, length=64),
    )
    traced = tracing.trace(model, header, Sequences(ids, np.ones_like(ids)), context)
    if int8:
        traced, _ = GRAPH_PASSES["static-int8"](model, traced, StaticInt8(min_cosine=None), replace(context, index=1))
    folders = {runtime: work / runtime for runtime in RUNTIMES}
    for runtime, folder in folders.items():
        RUNTIMES[runtime].save(model, folder, traced, [])
    return folders


def _estimated(given: Namespace, model: Path) -> float:
    """The speed over the source in the table's runtime that the table expects of a model."""
    header, table = inspect_model(FolderFiles(model)), Times.read(given.table).table
    anatomy = options_of(given, [2.0]).anatomy(header)
    shape = shape_of(load_model(model, header), anatomy)
    if OWN_SHAPES in header.config:
        return round(table.speed(shape.heads, shape.widths), 3)
    layer = max(table.heads.values()) + max(table.widths.values())  # its graph computes all positions of all layers
    return round(table.source / (table.rest + anatomy.layers * layer), 3)


def in_onnx(graph: Path, threads: int) -> Answer:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])
    wanted = {value.name for value in session.get_inputs()}

    def answer(batch: Batch) -> NDArray[np.float32]:
        feeds = {"token_type_ids": torch.zeros_like(batch.ids), **batch.inputs}
        found: NDArray[np.float32] = session.run(None, {name: feeds[name].numpy() for name in wanted})[0]
        return found

    return answer


def timed(given: Namespace, folders: Mapping[str, Mapping[str, Path]], work: Path) -> Rounds:
    """Time all forms by turns."""
    options = options_of(given, [2.0])
    shape = TimedShape(options.batch, options.length, 20 * given.rounds)
    ids = 1000 + np.arange(options.length)
    task = Task("embedding", "AutoModel", (), (shape,), ids, "mean", 1, given.threads)
    forms = [(name, runtime) for name, made in folders.items() for runtime in made]
    with contextlib.ExitStack() as stack:
        consumers = []
        for at, (name, runtime) in enumerate(forms):
            file = Path(RUNTIMES[runtime].CONSUMER)
            opened = Consumer(file, folders[name][runtime], task, name=f"form-{at}", scratch=work)
            consumers.append(stack.enter_context(opened))
        for consumer in consumers:
            consumer.run()
        rounds = timed_rounds(shape, consumers, lambda _share: None)
    return {form: np.asarray([run["milliseconds"] for run in runs]) for form, runs in zip(forms, rounds, strict=True)}


def faster(rounds: Rounds, base: tuple[str, str], form: tuple[str, str]) -> tuple[float, float, float]:
    """How many times as fast a form is: the ratio of the undisturbed times, and of those of the first and the second half of the rounds."""
    half = len(rounds[base]) // 2
    low, high = sorted(
        _fast(rounds[base][part]) / _fast(rounds[form][part]) for part in (slice(half), slice(half, None))
    )
    return round(_fast(rounds[base]) / _fast(rounds[form]), 3), round(low, 3), round(high, 3)


def _fast(milliseconds: Array) -> float:
    """The time of a run when nothing disturbs it: the table counts the fastest of fewer runs."""
    return float(np.quantile(milliseconds, 0.02))


def best_source(rounds: Rounds) -> tuple[str, str]:
    """The source in the runtime that is the fastest in float."""
    return min((form for form in rounds if form[0] == "source"), key=lambda form: _fast(rounds[form]))


def _of_model(
    given: Namespace,
    name: str,
    found: Mapping[str, Qualities],
    rounds: Rounds,
    estimated: float | None,
    own: str,
) -> list[Figure]:
    shaped, _, text = name.partition("-")
    speed = float(text.removesuffix("x")) if text else 0.0
    measure_of, least = KINDS[given.kind].bars.get(speed, ("", {})) if shaped == "shape" else ("", {})
    row, figures = f"{given.kind}{where()}/{name}", []
    for quality, (mean, low, high) in changes(found[name], found["source"]).items():
        value, before = (float(found[side][quality].mean()) for side in (name, "source"))
        bar = f">= {least[quality]}" if quality in least else ""
        figures += [
            Figure(f"{row}/{quality}", round(value, 4)),
            Figure(f"{row}/{quality}_change", mean, "", (low, high), bar=bar if measure_of == "change" else ""),
            Figure(
                f"{row}/{quality}_share",
                round(value / before, 4),
                "of the source's",
                bar=bar if measure_of == "share" else "",
            ),
        ]
    base = best_source(rounds)
    for runtime in RUNTIMES:
        figures.append(Figure(f"{row}/{runtime}", round(_fast(rounds[name, runtime]), 3), "ms"))
    middle, *ends = max(faster(rounds, base, (name, runtime)) for runtime in RUNTIMES)
    bar = f">= {speed}" if measure_of else ""
    figures.append(Figure(f"{row}/faster", middle, "× the best in float", (ends[0], ends[1]), bar=bar))
    medians = [float(np.median(rounds[base]) / np.median(rounds[name, runtime])) for runtime in RUNTIMES]
    figures.append(Figure(f"{row}/faster_by_medians", round(max(medians), 3), "× the best in float"))
    if estimated is not None:
        measured, *_ = faster(rounds, ("source", own), (name, own))
        off = abs(estimated / measured - 1)
        figures += [
            Figure(f"{row}/estimated", estimated, f"× the source in {given.runtime}"),
            Figure(f"{row}/measured", measured, f"× the source in {given.runtime}"),
            Figure(f"{row}/off", round(off, 3), "of the measured", bar="<= 0.1" if shaped == "shape" else ""),
        ]
    return figures
