"""Passes that calibrate on the inputs of a model's layers, block by block: GPTQ, AWQ, SparseGPT and Wanda."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.data.calibration import calibration_samples
from nightpress.core.compress.executors.blocks import (
    CacheStandIn,
    Method,
    Pressed,
    press_blocks,
)
from nightpress.core.compress.executors.rewrite import Effect
from nightpress.core.compress.model.checkpoint import read_shards
from nightpress.core.compress.model.companions import copy_companions
from nightpress.core.compress.model.quantization_config import write_config
from nightpress.core.compress.passes.block_methods import (
    ActivationAware,
    Quantized,
    Schemes,
    Sparse,
    WeightAndActivation,
)
from nightpress.core.compress.passes.quantize import OnGrid
from nightpress.core.compress.passes.sensitivity import part_of, schemes_within_budget
from nightpress.core.compress.passes.zeros import with_storage
from nightpress.core.handoff.report import LayerEffect, PassRecord
from nightpress.core.recipes.linears import is_linear_weight, module_of
from nightpress.core.recipes.passes import Awq, Gptq, PassOptions, Quantizing, SparseGpt, Wanda
from nightpress.core.recipes.passes.base import OnLinears
from nightpress.core.recipes.passes.quantize import Budgeted, Rounding


def gptq(source: Path, target: Path, options: Gptq, context: PassContext) -> PassRecord:
    """Quantize with GPTQ, pruning on the way if asked to. `target` becomes a compressed-tensors `pack-quantized` model."""
    schemes, summary, context = _schemes(source, options, context)
    return quantize(source, target, Quantized(options, schemes), schemes, options, context, summary)


def awq(source: Path, target: Path, options: Awq, context: PassContext) -> PassRecord:
    """Quantize with AWQ. `target` becomes a compressed-tensors `pack-quantized` model, its norms scaled."""
    schemes, summary, context = _schemes(source, options, context)
    method = ActivationAware(options, schemes, context.header)
    return quantize(source, target, method, schemes, options, context, summary)


def sparsegpt(source: Path, target: Path, options: SparseGpt, context: PassContext) -> PassRecord:
    """Prune with SparseGPT; a dense model of the same size comes out."""
    start = time.monotonic()
    done = record(options, context, press(source, target, Sparse(options), options, context), start, {})
    return with_storage(done, source, target)


def wanda(source: Path, target: Path, options: Wanda, context: PassContext) -> PassRecord:
    """Prune with Wanda; a dense model of the same size comes out."""
    start = time.monotonic()
    done = record(options, context, press(source, target, WeightAndActivation(options), options, context), start, {})
    return with_storage(done, source, target)


def _schemes(source: Path, options: Budgeted, context: PassContext) -> tuple[Schemes, dict[str, Any], PassContext]:
    """How each module is stored, what the record says of it, and a context with the progress that is left."""
    summary: dict[str, Any] = {"bits": options.bits, "group_size": options.group_size, "symmetric": options.symmetric}
    if options.budget is None:
        return options.scheme, summary, context
    schemes, found = schemes_within_budget(source, calibration_samples(source, context), options, context)
    rest = replace(context, progress=part_of(context, 0.5, 1.0))
    return schemes, summary | {"bits": None, "budget": options.budget} | found, rest


def quantize(
    source: Path,
    target: Path,
    method: Method,
    schemes: Schemes,
    options: Quantizing,
    context: PassContext,
    summary: dict[str, Any],
) -> PassRecord:
    """Press with a method that stores weights in these schemes, and write the schemes to config.json."""
    start = time.monotonic()
    pressed = press(source, target, method, options, context)
    modules = {name.removesuffix(".weight"): schemes(name.removesuffix(".weight")) for name in pressed.effects}
    write_config(target, modules, kept=[name.removesuffix(".weight") for name in pressed.kept])
    return record(options, context, pressed, start, summary)


def press(
    source: Path,
    target: Path,
    method: Method,
    options: PassOptions,
    context: PassContext,
    *,
    cache: CacheStandIn | None = None,
) -> Pressed:
    """Run the blocks executor over the linear layers that the options take, and round the tables that they take."""
    infos = [stored.info for shard in read_shards(source) for stored in shard.tensors]
    chosen = [info for info in infos if isinstance(options, OnLinears) and is_linear_weight(info, options.ignore)]
    outside: dict[str, OnGrid] = {}
    if isinstance(options, Rounding):
        tables = [info for info in infos if options.takes_table(info)]
        outside = {table.name: OnGrid(table, options.scheme(module_of(table)), options.ranges) for table in tables}
    pressed = press_blocks(
        source,
        target,
        method,
        calibration_samples(source, context),
        context,
        chosen=frozenset(info.name for info in chosen),
        recipe=options.model_dump_json(),
        outside=outside,
        cache=cache,
    )
    copy_companions(source, target)
    return pressed


def record(
    options: PassOptions,
    context: PassContext,
    pressed: Pressed,
    start: float,
    summary: dict[str, Any],
) -> PassRecord:
    """What the report says of a pass that began at `start` (`time.monotonic`)."""
    infos = {info.name: info for info in context.header.tensors}
    total = sum(pressed.effects.values(), Effect())
    weights = sum(infos[name].shape[0] * infos[name].shape[1] for name in pressed.effects)
    layers = tuple(
        LayerEffect(
            name=name.removesuffix(".weight"),
            bytes_before=infos[name].size,
            bytes_after=pressed.bytes_after[name],
            relative_error=effect.relative_error,
            sparsity=effect.zeros / (infos[name].shape[0] * infos[name].shape[1]),
        )
        for name, effect in pressed.effects.items()
    )
    return PassRecord(
        index=context.index,
        name=options.name,
        seconds=time.monotonic() - start,
        summary=summary
        | {
            "layers": len(layers),
            "zeros": total.zeros,
            "sparsity": total.zeros / max(1, weights),
            "relative_error": total.relative_error,
            "bytes_before": sum(info.size for info in infos.values()),
            "bytes_after": sum(info.size for name, info in infos.items() if name not in pressed.effects)
            + sum(pressed.bytes_after.values()),
            "uncalibrated": list(pressed.unseen),
            "starved_experts": pressed.undersampled,
        },
        warnings=tuple(
            f"`{options.name}`: {text} ({count} {'block' if count == 1 else 'blocks'})."
            for text, count in pressed.warnings.items()
        ),
        layers=layers,
    )
