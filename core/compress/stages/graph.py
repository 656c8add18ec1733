"""The stage that exports the artifacts.

Graph formats share one graph, traced from the pressed model. Passes of the stage `graph` change the graph before it is saved.
"""

import gc
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from nightpress.core.compress.export import compressed_tensors, gguf, mlx, onnx, openvino, safetensors, transformersjs
from nightpress.core.compress.export.early_exit import trace_exits
from nightpress.core.compress.export.sentence import complete_layout
from nightpress.core.compress.graph import tracing
from nightpress.core.compress.graph.tracing import Traced
from nightpress.core.compress.memory import return_freed_memory
from nightpress.core.compress.passes.registry import graph_pass_of
from nightpress.core.compress.stages.clock import Report, parts
from nightpress.core.compress.stages.job import PressJob, naming_the_package
from nightpress.core.compress.stages.judge import judge_of
from nightpress.core.compress.stages.state import Exported, State
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.exports import GRAPH_FORMATS, Export
from nightpress.core.recipes.inspect import FolderFiles, inspect_model

_EXPORTERS = {
    "onnx": onnx,
    "openvino": openvino,
    "transformers.js": transformersjs,
    "gguf": gguf,
    "mlx": mlx,
    "safetensors": safetensors,
    "compressed-tensors": compressed_tensors,
}


def run(job: PressJob, state: State) -> None:
    """Write each artifact to its folder below out/."""
    job.clock.enter("exporting")
    for export, (start, end) in zip(job.recipe.exports, parts(0.5, 0.7, len(job.recipe.exports)), strict=True):
        job.clock.at(start, f"exporting {export.name}")
        folder = job.out / export.name
        runner = _save(job, state, export, folder, job.clock.span(start, end))
        complete_layout(folder, state.header)
        state.exported.append(Exported(export, folder, runner))
    for plain in state.trial.uncompressed:
        job.clock.at(0.7, f"exporting the uncompressed model as {plain.name}, to time it beside the artifact")
        try:
            state.uncompressed[plain.format] = _save_uncompressed(job, state, plain)
        except NightpressError as error:
            if error.code is ErrorCode.DISK_FULL:
                raise
            state.notes.append(f"The uncompressed model could not be exported as {plain.name}, to time it: {error}")
            job.warn(state.notes[-1])


def _save_uncompressed(job: PressJob, state: State, export: Export) -> Exported:
    """Export the source as it is. The trace is no checkpoint: nothing but a speed depends on it."""
    exporter: Any = _EXPORTERS[export.format]
    folder, header, weights = job.work / "uncompressed" / export.name, state.source_header, export.weights
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier attempt
    folder.parent.mkdir(parents=True, exist_ok=True)
    if weights is None:
        exporter.save(job.source, folder)
    elif export.format == "gguf":
        gguf.save(job.source, folder, header, weights=weights, pooling=state.trial.task.pooling)
    else:
        context = job.context(header, lambda _fraction, _text: None, index=len(job.recipe.passes))
        check = state.trial.task.sets[0].sequences
        traced = tracing.trace(job.source, header, check, replace(context, checkpoint=lambda _path, _step: None))
        exporter.save(job.source, folder, traced, [], weights=weights)
        _free_graphs()
    return Exported(export, folder, Path(exporter.CONSUMER))


def _save(job: PressJob, state: State, export: Export, folder: Path, report: Report) -> Path:
    """Write one artifact. Returns the path of the runner script that loads it."""
    exporter: Any = _EXPORTERS[export.format]
    pressed = state.pressed(export)
    if export.format in GRAPH_FORMATS:
        if export.speed not in state.traced:
            state.traced[export.speed] = _trace(job, state, export, report)
        passes = [(at, options) for at, options in enumerate(job.recipe.passes) if options.stage == "runtime"]
        for record in exporter.save(pressed, folder, state.traced[export.speed], passes, weights=export.weights):
            state.records.append(job.publish_pass(record, record.index))
        _free_graphs()
    elif export.format == "gguf":
        assert export.weights is not None
        gguf.save(pressed, folder, state.header, weights=export.weights, pooling=state.trial.task.pooling)
    else:
        exporter.save(pressed, folder)
    return state.runner or Path(exporter.CONSUMER)


def _trace(job: PressJob, state: State, export: Export, report: Report) -> Traced:
    """Trace the graph of the export's model and apply the passes of the stage `graph`."""
    passes, folder = job.recipe.passes, state.pressed(export)
    header = state.header if folder == state.folder else inspect_model(FolderFiles(folder))
    trace = trace_exits if passes and passes[-1].early_exits else tracing.trace
    traced = trace(folder, header, state.check, job.context(header, report, index=len(passes)))
    _free_graphs()
    for index, options in enumerate(passes):
        if options.stage == "graph":
            with naming_the_package(options):
                context = job.context(header, report, index=index, judge=judge_of(job, state, options))
                traced, record = graph_pass_of(options)(folder, traced, options, context)
            _free_graphs()
            if export.speed is not None:
                record = record.model_copy(update={"summary": {"speed": export.speed, **record.summary}})
            state.records.append(job.publish_pass(record, index))
    return traced


def _free_graphs() -> None:
    """Collect graphs that are no longer needed, before the next is made. They have reference cycles and hold the weights several times."""
    gc.collect()
    return_freed_memory()
