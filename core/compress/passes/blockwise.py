"""Shared code of the calibrated passes: run the blocks executor over linear layers, and write the record of the pass."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nightpress.core.compress.calibration.samples import calibration_samples
from nightpress.core.compress.context import PassContext
from nightpress.core.compress.executors.blocks import CacheStandIn, FinalTensor, Inputs, Method, RunResult, press_blocks
from nightpress.core.compress.executors.rewrite import Effect, Rewrite
from nightpress.core.compress.grids.rounded_inputs import input_global_scale
from nightpress.core.compress.grids.stored import Coded, dequantized, to_tensors
from nightpress.core.compress.model.checkpoint import read_shards
from nightpress.core.compress.model.companions import copy_companions
from nightpress.core.compress.model.quantization_config import write_config
from nightpress.core.compress.passes.stacks import share_rows
from nightpress.core.compress.ranks.group import ALONE, Group
from nightpress.core.compress.solvers.gram import Gram, GramAndPeak
from nightpress.core.handoff.report import LayerEffect, PassRecord, Series
from nightpress.core.recipes.passes import PassOptions, Quantizing
from nightpress.core.recipes.passes.gptq import Formatted
from nightpress.core.recipes.schemes import Scheme

#: Name of a module → the scheme in which its weight is stored.
Schemes = Callable[[str], Scheme]


def scheme_of(schemes: Schemes, weight: str) -> Scheme:
    return schemes(weight.removesuffix(".weight"))


def quantize(
    source: Path,
    target: Path,
    method: Method,
    schemes: Schemes,
    options: Quantizing,
    context: PassContext,
    summary: dict[str, Any],
    *,
    outside: Mapping[str, Rewrite] | None = None,
    step: int | None = None,
) -> PassRecord:
    """Run a method that stores weights in `schemes`, and write the `quantization_config` into config.json.

    outside: name → rewrite of each weight outside the blocks; these are rounded to nearest. step: as in `press_blocks`.
    """
    start = time.monotonic()
    pressed = press(source, target, method, options, context, outside=outside, step=step)
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
    outside: Mapping[str, Rewrite] | None = None,
    cache: CacheStandIn | None = None,
    step: int | None = None,
) -> RunResult:
    """Run the blocks executor over the linear layers that the options select, and rewrite the weights in `outside`."""
    infos = [tensor.info for shard in read_shards(source) for tensor in shard.tensors]
    pressed = press_blocks(
        source,
        target,
        method,
        calibration_samples(source, context),
        context,
        chosen=frozenset(info.name for info in infos if options.takes_linear(info)),
        recipe=options.model_dump_json(),
        outside=outside or {},
        cache=cache,
        step=step,
    )
    copy_companions(source, target)
    return pressed


def record(
    options: PassOptions,
    context: PassContext,
    pressed: RunResult,
    start: float,
    summary: dict[str, Any],
) -> PassRecord:
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
        series=tuple(
            Series(name=name, x=tuple(index + 1 for index in by_block), y=tuple(by_block.values()), x_label="block")
            for name, by_block in pressed.figures.items()
        ),
    )


def settle_coded(
    name: str, scheme: Scheme, coded: Coded, before: Tensor, *, input_scale: Tensor | None = None
) -> FinalTensor:
    """Return a coded weight [out, in] as the block's final tensor: dequantized, with its stored tensors and its rounding error.

    before [out, in] float32: the weight before rounding.
    """
    scales = {} if input_scale is None else {name: input_scale}
    return settle_all_coded({name: (coded, before)}, scheme, input_scales=scales)[name]


def settle_all_coded(
    weights: Mapping[str, tuple[Coded, Tensor]],
    scheme: Scheme,
    *,
    input_scales: Mapping[str, Tensor],
    rows: Mapping[str, int] | None = None,
    group: Group = ALONE,
) -> dict[str, FinalTensor]:
    """`settle_coded` for several weights of one scheme: name → (coded weight, weight before rounding). Waits for the device once.

    input_scales: by weight, of those whose inputs have a static scale. group: processes that each give the rows that `Group.share` says;
    rows: the number of all rows of each weight. Only the first of them makes the tensors to write.
    """
    joined = {name: coded for name, (coded, _) in weights.items()}
    if rows is not None:
        joined = {name: join_coded(coded, rows[name], group) for name, coded in joined.items()}
    after = {name: dequantized(coded, scheme) for name, coded in joined.items()}
    changes = [(before, share_rows(after[name], group)) for name, (_, before) in weights.items()]
    return {
        name: FinalTensor(
            weight=after[name],
            tensors=to_tensors(name, scheme, coded, input_scale=input_scales.get(name)) if group.first else {},
            effect=effect,
            joined=group.size > 1,
        )
        for (name, coded), effect in zip(joined.items(), effects_of(changes, group), strict=True)
    }


def join_coded(part: Coded, rows: int, group: Group) -> Coded:
    """The whole coded weight [rows, in], of which each process has the rows that `Group.share` says. Its scales are in its rows."""
    return replace(
        part,
        codes=group.join_rows(part.codes, rows),
        scale=group.join_rows(part.scale, rows),
        zero_point=None if part.zero_point is None else group.join_rows(part.zero_point, rows),
    )


def watch_inputs(options: Formatted, columns: int, device: torch.device) -> Gram:
    """Return the statistic of a layer's inputs that the options need."""
    kind = GramAndPeak if options.scheme("").has_input_global_scale else Gram
    return kind(columns, device)


def input_scales(inputs: Sequence[Inputs]) -> dict[str, Tensor]:
    """Return weight → the global scale of its inputs, where these were watched for it."""
    return {
        name: input_global_scale(group.statistic.peak)
        for group in inputs
        if isinstance(group.statistic, GramAndPeak)
        for name in group.names
    }


def made_up(name: str, weight: Tensor, stored: torch.dtype) -> FinalTensor:
    """Return a norm, a bias or a router that absorbed scale factors, in the dtype in which it is stored."""
    value = weight.to(stored)
    return FinalTensor(weight=value, tensors={name: value}, effect=None)


def effect_of(before: Tensor, after: Tensor) -> Effect:
    return effects_of([(before, after)])[0]


def effects_of(changes: Sequence[tuple[Tensor, Tensor]], group: Group = ALONE) -> list[Effect]:
    """The effects of changes (before, after), both float32 [out, in] on one device. Waits for the device once.

    group: processes that each give other rows of the same weights.
    """
    sums = [
        torch.stack(
            [
                (before - after).square().sum(dtype=torch.float64),
                before.square().sum(dtype=torch.float64),
                (after == 0).sum().double(),
            ]
        )
        for before, after in changes
    ]
    whole = torch.stack(sums)
    group.sum(whole)
    return [Effect(error, norm, int(zeros)) for error, norm, zeros in whole.tolist()]
