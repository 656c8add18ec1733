"""`shape-to-speed`: removes an encoder's heads, channels and modules by their error and their measured time, and trains it after each step.

ZipLM (Kurtic, Frantar and Alistarh, arXiv 2302.04089). A stage takes the model to one speed: the order of removal of each layer's units, the
choice of a level for each layer under the budget of time, and a training with the source as the teacher. The result of each stage but its
training is a checkpoint; the training resumes exactly by its own.
"""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.data.examples import Examples, read_examples
from nightpress.core.compress.executors.train import TrainingResult
from nightpress.core.compress.graph.tracing import content_digest
from nightpress.core.compress.model.checkpoint import write_file
from nightpress.core.compress.model.companions import family_member
from nightpress.core.compress.model.modules import BiasAlone, give
from nightpress.core.compress.model.networks import embeddings_of, find_blocks, load_model, save_model
from nightpress.core.compress.passes.distill import StudentTraining, teach
from nightpress.core.compress.passes.latency_table import LatencyTable, latency_table
from nightpress.core.compress.passes.registry import folder_pass
from nightpress.core.compress.passes.shape_errors import Module, modules_of, moments, sensitivities
from nightpress.core.compress.ranks.group import ALONE
from nightpress.core.compress.solvers.knapsack import choose
from nightpress.core.compress.solvers.structures import Removal, removal
from nightpress.core.compress.solvers.units import Known, columns_of, compensated
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.report import PassRecord, Series
from nightpress.core.recipes.anatomy import OWN_SHAPES, Anatomy
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.passes import ShapeToSpeed

_MEASURED = 0.15  #: fraction of the pass in which the table is measured
_NANOSECONDS = 1_000_000  #: of a millisecond


@dataclass(frozen=True)
class Shape:
    """What each layer keeps."""

    heads: tuple[int, ...]  #: groups of heads
    widths: tuple[int, ...]  #: channels


def shape_to_speed_with(
    source: Path, target: Path, options: ShapeToSpeed, context: PassContext, table: LatencyTable
) -> PassRecord:
    """The pass, with a table that was measured before. `target` becomes the fastest model; slower ones are below it, see `family_member`."""
    start = time.monotonic()
    torch.set_num_threads(context.threads)
    anatomy = options.anatomy(context.header)
    _check_reachable(options, table)
    examples = read_examples(
        source,
        context.header,
        options.train.data,
        context.data_files.get(options.train.data),
        length=options.train.length,
        labelled=options.wants_labels(context.header),
    )
    teacher = load_model(source, context.header)
    made = hashlib.sha256(
        f"{content_digest(source)}{options.model_dump_json()}{table.to_json()}{context.seed}".encode()
    )
    made.update(examples.digest())
    folder, student = source, load_model(source, context.header)
    told: list[dict[str, Any]] = []
    series: list[Series] = []
    count = len(options.stages)
    begins = np.linspace(_MEASURED, 1.0, count + 1).tolist()
    for at, speed in enumerate(options.stages):
        part = context.part(begins[at], begins[at + 1], f"stage {at + 1} of {count}: ")
        made.update(f"{speed}".encode())
        folder = context.work_dir / "shape" / f"{context.index}-{made.hexdigest()[:16]}"
        record = folder / "shape.done"
        if not record.is_file():
            _shape(student, teacher, source, folder, options, anatomy, table, speed, examples, part)
            write_file(record, b"")
            context.whole(
                2 + at, *sorted(file for file in folder.rglob("*") if file.is_file() and file != record), record
            )
        student = load_model(folder, inspect_model(FolderFiles(folder)))
        shape = shape_of(student, anatomy)
        trained = _train(student, teacher, source, options, speed, part)
        series += [curve.model_copy(update={"name": f"{curve.name} to {speed:g}x"}) for curve in trained.series]
        told.append(_told(table, anatomy, shape, speed, trained))
        if speed in options.targets:
            fastest = speed == options.targets[-1]
            out = target if fastest else family_member(target, speed)
            save_model(student, source, out, context.header)
    return _record(options, context, table, student, told, series, start)


@folder_pass(ShapeToSpeed)
def shape_to_speed(source: Path, target: Path, options: ShapeToSpeed, context: PassContext) -> PassRecord:
    """Measure the table, and make the models of all speeds. Raises NightpressError(invalid_recipe) for a speed out of reach."""
    table = latency_table(source, options, options.anatomy(context.header), context.part(0.0, _MEASURED))
    return shape_to_speed_with(source, target, options, context, table)


def shape_of(model: Any, anatomy: Anatomy) -> Shape:
    """What each layer of a model keeps."""
    path, blocks = find_blocks(model)
    found: dict[int, list[int]] = {0: [], 1: []}
    for module in modules_of(path, len(blocks), anatomy):
        kind = 0 if module.inner is anatomy.family.attention else 1
        found[kind].append(model.get_submodule(module.name).in_features // module.width)
    return Shape(tuple(found[0]), tuple(found[1]))


# A stage ------------------------------------------------------------------------------------------------------------------


def _shape(
    student: Any,
    teacher: Any,
    source: Path,
    folder: Path,
    options: ShapeToSpeed,
    anatomy: Anatomy,
    table: LatencyTable,
    speed: float,
    examples: Examples,
    context: PassContext,
) -> None:
    """Take the student to a speed, without training, and save it to `folder`."""
    device = torch.device(context.device)
    student.to(device).eval()
    teacher.to(device)
    chosen = examples.take(np.unique(np.linspace(0, len(examples) - 1, options.samples).astype(np.int64)))
    path, blocks = find_blocks(student)
    modules = [
        module
        for module in modules_of(path, len(blocks), anatomy)
        if not isinstance(student.get_submodule(module.name), BiasAlone)
    ]
    context.progress(0.0, f"measuring the inputs of {len(modules)} modules")
    known = moments(student, modules, chosen, options, device)
    lesson = StudentTraining(student, teacher, options.resolved(context.header), source, context.header, None, ALONE)
    weights = sensitivities(lesson, student, modules, known, chosen, options, context)
    removals = []
    for at, module in enumerate(modules):
        context.progress(
            0.1 + 0.2 * at / len(modules), f"ordering the units of {module.name}, {at + 1} of {len(modules)}"
        )
        layer = student.get_submodule(module.name)
        removals.append(
            removal(layer.weight.detach(), known[module.name].second, module.width, damping=options.damping)
        )
    kept = chosen_levels(modules, removals, weights, options, anatomy, table, speed)
    tensors: dict[str, Tensor] = {}
    for module, removed, count in zip(modules, removals, kept, strict=True):
        tensors |= _narrowed(student, path, module, anatomy, removed, known[module.name], count, options.damping)
    give(student, tensors)
    student.to("cpu")
    shape = shape_of(student, anatomy)
    setattr(
        student.config,
        OWN_SHAPES,
        {"heads": [anatomy.group * count for count in shape.heads], "channels": list(shape.widths)},
    )
    save_model(student, source, folder, context.header)


def chosen_levels(
    modules: Sequence[Module],
    removals: Sequence[Removal],
    weights: Sequence[float],
    options: ShapeToSpeed,
    anatomy: Anatomy,
    table: LatencyTable,
    speed: float,
) -> tuple[int, ...]:
    """Return how many units each module keeps: the least sum of errors whose time is within the budget (ZipLM, section 3.2).

    weights: what the loss gains if a module is left out; its errors at all levels are multiplied by it.
    """
    levels, times, errors = [], [], []
    for module, removed, weight in zip(modules, removals, weights, strict=True):
        attention = module.inner is anatomy.family.attention
        if module.block == anatomy.layers - 1:
            column = table.last_heads if attention else table.last_widths
        else:
            column = table.heads if attention else table.widths
        units = len(removed.order)
        fitting = [
            count for count in (options.head_levels if attention else options.width_levels)(anatomy) if count <= units
        ]
        levels.append(fitting)
        times.append([round(_NANOSECONDS * column[count]) for count in fitting])
        errors.append([weight * float(removed.errors[units - count]) for count in fitting])
    budget = round(_NANOSECONDS * (table.source / speed - table.rest))
    picked = choose(times, errors, budget)
    return tuple(fitting[at] for fitting, at in zip(levels, picked, strict=True))


def _narrowed(
    student: Any,
    path: str,
    module: Module,
    anatomy: Anatomy,
    removed: Removal,
    known: Known,
    kept: int,
    damping: float,
) -> dict[str, Tensor]:
    """The new tensors of a module that keeps `kept` units, by the names of the model's parameters."""
    units = len(removed.order)
    if kept == units:
        return {}
    device = known.mean.device
    goes, stays = (
        removed.order[: units - kept].sort().values.to(device),
        removed.order[units - kept :].sort().values.to(device),
    )
    layer = student.get_submodule(module.name)
    columns = columns_of(stays, module.width), columns_of(goes, module.width)
    weight, bias = compensated(
        layer.weight.detach(), None if layer.bias is None else layer.bias.detach(), known, *columns, damping
    )
    found = {f"{module.name}.weight": weight}
    if bias is not None:
        found[f"{module.name}.bias"] = bias
    for name, (part,) in module.inner.inputs:
        full = f"{path}.{module.block}.{name}"
        rows = columns_of(stays, anatomy.part(part))
        given = student.get_submodule(full)
        found[f"{full}.weight"] = given.weight.detach()[rows]
        if given.bias is not None:
            found[f"{full}.bias"] = given.bias.detach()[rows]
    return {name: tensor.clone() for name, tensor in found.items()}


def _train(
    student: Any, teacher: Any, source: Path, options: ShapeToSpeed, speed: float, context: PassContext
) -> TrainingResult:
    """Train the student on the source's answers. Afterwards it is on the CPU."""
    # The recipe of the training's checkpoint names the stage.
    stage = options.model_copy(update={"speed": f">= {speed:g}x", "speeds": None})
    frozen = embeddings_of(student) if options.train.freeze_embeddings else []
    trained, _ = teach(student, teacher, frozen, source, stage, context.part(0.3, 1.0))
    return trained


def _check_reachable(options: ShapeToSpeed, table: LatencyTable) -> None:
    most = table.source / table.rest
    if options.targets[-1] >= most:
        raise NightpressError(
            ErrorCode.INVALID_RECIPE,
            f"`shape-to-speed`: {options.targets[-1]:g}x is out of reach: embeddings, norms and head alone take {table.rest:.2f} ms of the source's {table.source:.2f} ms.",
            hint=f"Ask for less than {most:.1f}x, for longer texts or larger batches, or use `type: int8`.",
        )


# What is told -------------------------------------------------------------------------------------------------------------


def _told(table: LatencyTable, anatomy: Anatomy, shape: Shape, speed: float, trained: TrainingResult) -> dict[str, Any]:
    return {
        "speed": speed,
        "estimated_speed": round(table.speed(shape.heads, shape.widths), 3),
        "estimated_ms": round(table.estimate(shape.heads, shape.widths), 4),
        "heads": [anatomy.group * count for count in shape.heads],
        "channels": list(shape.widths),
        "steps": trained.steps,
        "best_step": trained.best_step,
        "validation": dict(trained.validation),
    }


def _record(
    options: ShapeToSpeed,
    context: PassContext,
    table: LatencyTable,
    student: Any,
    told: list[dict[str, Any]],
    series: list[Series],
    start: float,
) -> PassRecord:
    return PassRecord(
        index=context.index,
        name=options.name,
        seconds=time.monotonic() - start,
        summary={
            "runtime": options.runtime,
            "type": options.type,
            "batch": options.batch,
            "length": options.length,
            "losses": list(options.losses(context.header)),
            "parameters_before": context.header.parameters,
            "parameters_after": sum(parameter.numel() for parameter in student.parameters()),
            "stages": told,
            "table": {
                "conditions": table.conditions,
                "source_ms": table.source,
                "whole_ms": table.whole,
                "rest_ms": table.rest,
                "heads_ms": {str(count): ms for count, ms in table.heads.items()},
                "channels_ms": {str(count): ms for count, ms in table.widths.items()},
                "last_heads_ms": max(table.last_heads.values()),
                "last_channels_ms": max(table.last_widths.values()),
            },
        },
        series=tuple(series),
    )
