"""Structured pruning: passes that remove feed-forward channels, attention heads or whole blocks."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from nightpress.core.compress.calibration.samples import calibration_samples
from nightpress.core.compress.context import PassContext, over_ranks
from nightpress.core.compress.executors.batches import count_of
from nightpress.core.compress.executors.blocks import FinalTensor, Inputs, press_blocks
from nightpress.core.compress.executors.rewrite import Effect
from nightpress.core.compress.executors.survey import block_gradients, survey, unit_gradients
from nightpress.core.compress.model.checkpoint import tensor_bytes, write_index, write_json, write_tensors
from nightpress.core.compress.model.companions import copy_companions
from nightpress.core.compress.model.skeleton import Batch
from nightpress.core.compress.model.source import SourceTensors
from nightpress.core.compress.passes.registry import folder_pass
from nightpress.core.compress.passes.within import Search, smallest_model
from nightpress.core.compress.solvers.units import (
    Known,
    Moments,
    columns_of,
    compensated,
    output_losses,
    shares,
    smallest,
    weight_norms,
)
from nightpress.core.handoff.report import LayerEffect, PassRecord
from nightpress.core.recipes.anatomy import Anatomy
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.passes import Channels, Heads, Layers
from nightpress.core.recipes.passes.layers import renumbered
from nightpress.core.recipes.passes.shrink import Narrowing, Shrinking


@folder_pass(Channels, Heads)
def narrow(source: Path, target: Path, options: Narrowing, context: PassContext) -> PassRecord:
    """Remove channels or heads from every block, one block at a time. `target` becomes a smaller model."""
    anatomy = options.anatomy(context.header)
    samples = calibration_samples(source, context)
    scores: list[Tensor] | None = None
    if options.by_gradient or options.across == "global":
        work, count = (source, samples, options, anatomy), count_of(samples)
        scores = over_ranks(_scores_ahead, *work, samples=count, context=context)
    inner = options.inner(anatomy)
    axis = 0 if anatomy.transposed else 1

    def press(options: Narrowing, folder: Path, context: PassContext) -> PassRecord:
        start = time.monotonic()
        pressed = press_blocks(
            source,
            folder,
            Narrow(options, anatomy, scores),
            samples,
            context,
            chosen=frozenset(anatomy.name(at, inner.output) for at in range(anatomy.layers)),
            recipe=options.model_dump_json() + _digest(scores),
        )
        copy_companions(source, folder)
        after = SourceTensors.in_folder(folder)
        units = [after.stored(anatomy.name(at, inner.output)).info.shape[axis] for at in range(anatomy.layers)]
        kept = tuple(count // anatomy.unit(inner) for count in units)
        _write_config(folder, options.config(context.header, kept))
        summary = {"units": options.counts(anatomy), "kept": kept}
        return _record(options, context, folder, pressed.effects, start, summary)

    if options.within is None:
        return press(options, target, context)
    return _smallest(source, target, options, context, press)


@folder_pass(Layers)
def layers(source: Path, target: Path, options: Layers, context: PassContext) -> PassRecord:
    """Remove whole blocks. `target` becomes a model with fewer blocks."""
    anatomy = options.anatomy(context.header)
    influence: list[float] = []
    if options.remove is None:
        samples = calibration_samples(source, context)
        work, count = (source, samples, options, anatomy), count_of(samples)
        influence = over_ranks(_influence, *work, samples=count, context=context)
    order = sorted(range(len(influence)), key=lambda at: (influence[at], at))

    def press(options: Layers, folder: Path, context: PassContext) -> PassRecord:
        start = time.monotonic()
        gone = set(order[: options.count] if options.remove is None else options.remove)
        kept = [at for at in range(anatomy.layers) if at not in gone]
        _copy_blocks(source, folder, anatomy, kept)
        copy_companions(source, folder)
        _write_config(folder, options.without(context.header, kept).config)
        context.progress(1.0, "done")
        summary = {"removed": sorted(gone), "blocks": anatomy.layers, "kept": kept, "importance": influence}
        return _record(options, context, folder, {}, start, summary)

    if options.within is None:
        return press(options, target, context)
    return _smallest(source, target, options, context, press)


Extent = TypeVar("Extent", bound=Shrinking)


def _smallest(
    source: Path,
    target: Path,
    options: Extent,
    context: PassContext,
    press: Callable[[Extent, Path, PassContext], PassRecord],
) -> PassRecord:
    """Search for the smallest model that keeps the gate. If none does, the model stays as it is. press writes one of the choices."""
    choices = options.choices(context.header)
    steps = [*(choice.extent for choice in choices), "the model as it was"]
    search = Search(options, steps, context, context.work_dir / f"within-{context.index}.json")

    def press_step(step: int, folder: Path, context: PassContext) -> PassRecord:
        if step < len(choices):
            return press(choices[step], folder, context)
        start, anatomy = time.monotonic(), options.anatomy(context.header)
        _copy_blocks(source, folder, anatomy, range(anatomy.layers))
        copy_companions(source, folder)
        return _record(options, context, folder, {}, start, {})

    return smallest_model(search, target, press_step, sure=True)


class Narrow:
    """Each block keeps its most important units. With `compensate`, the output projection is fitted to compensate for the others."""

    by_group = (
        False  # The layers before the watched layer change too, and they have already run when its inputs are known.
    )

    def __init__(self, options: Narrowing, anatomy: Anatomy, scores: Sequence[Tensor] | None) -> None:
        self._options, self._anatomy, self._inner = options, anatomy, options.inner(anatomy)
        self._scores = scores
        self._kept = (
            shares(scores, options.share, options.step)
            if scores is not None and options.across == "global"
            else [options.kept(count) for count in options.counts(anatomy)]
        )

    def watch(self, columns: int, device: torch.device) -> Moments:
        return Moments(columns, device)

    def settle(
        self, block: Mapping[str, Tensor], inputs: Sequence[Inputs], device: torch.device
    ) -> dict[str, FinalTensor]:
        (seen,) = inputs
        (name,) = seen.names
        place = self._anatomy.place(name)
        assert place is not None
        assert isinstance(seen.statistic, Moments)
        index = place[0]
        known = seen.statistic.finish(centred=_bias_of(name) in block)
        scores = (
            unit_scores(self._options, self._anatomy, index, block, known, device)
            if self._scores is None
            else self._scores[index].to(device)
        )
        stays, goes = smallest(scores, self._kept[index])
        settled = self._output(name, block, known, stays, goes, device)
        for module, parts in self._inner.inputs:
            rows = self._rows(parts, stays, len(scores)).cpu()
            weight = block[self._anatomy.name(index, module)]
            settled[self._anatomy.name(index, module)] = self._cut(self._anatomy.name(index, module), weight, rows)
            bias = self._anatomy.name(index, module, "bias")
            if bias in block:
                value = block[bias][rows].contiguous()
                settled[bias] = FinalTensor(value, {bias: value}, None)
        return settled

    def restore(self, name: str, written: Mapping[str, Tensor]) -> Tensor:
        return written[name]

    def _rows(self, parts: Sequence[Any], stays: Tensor, count: int) -> Tensor:
        """Return the indices of a layer's outputs that belong to the units that stay."""
        found, start = [], 0
        for part in parts:
            width = self._anatomy.part(part)
            found.append(start + columns_of(stays, width))
            start += count * width
        return torch.cat(found)

    def _cut(self, name: str, weight: Tensor, rows: Tensor) -> FinalTensor:
        value = (weight[:, rows] if self._anatomy.transposed else weight[rows]).contiguous()
        total, left = (float(tensor.double().square().sum()) for tensor in (weight, value))
        return FinalTensor(value, {name: value}, Effect(max(total - left, 0.0), total))

    def _output(
        self, name: str, block: Mapping[str, Tensor], known: Known, stays: Tensor, goes: Tensor, device: torch.device
    ) -> dict[str, FinalTensor]:
        stored = block[name]
        width = self._anatomy.unit(self._inner)
        stay, go = columns_of(stays, width), columns_of(goes, width)
        weight = stored.to(device).float()
        bias = block[_bias_of(name)].to(device).float() if _bias_of(name) in block else None
        new, new_bias = weight[:, stay], bias
        if self._options.compensate:
            new, new_bias = compensated(weight, bias, known, stay, go, self._options.damping)
        error = float((weight[:, stay] - new).square().sum()) + float(weight[:, go].square().sum())
        value = new.to(stored.dtype).contiguous()
        settled = {name: FinalTensor(value, {name: value}, Effect(error, float(weight.square().sum())))}
        if new_bias is not None and self._options.compensate:
            fitted = new_bias.to(stored.dtype)
            settled[_bias_of(name)] = FinalTensor(fitted, {_bias_of(name): fitted}, None)
        return settled


def unit_scores(
    options: Narrowing,
    anatomy: Anatomy,
    index: int,
    block: Mapping[str, Tensor],
    known: Known,
    device: torch.device,
) -> Tensor:
    """Return the importance of each unit of a block [units] float32: from its weights, or from its part of the output on calibration text.

    block: the tensors in their stored layout; only the output projection's weight is always [out, in].
    """
    inner = options.inner(anatomy)
    weight = block[anatomy.name(index, inner.output)].to(device).float()  # [out, in]
    width = anatomy.unit(inner)
    if options.importance == "activation":
        return output_losses(weight, known, width)
    units = weight.shape[1] // width
    parts = [weight.T.reshape(units, -1)]
    for module, kinds in inner.inputs:
        raw = block[anatomy.name(index, module)]
        rows, start = (raw.T if anatomy.transposed else raw).to(device), 0  # [out, in]
        for kind in kinds:
            size = units * anatomy.part(kind)
            parts.append(rows[start : start + size].reshape(units, -1))
            start += size
    return weight_norms(parts, 1 if options.importance == "l1" else 2)


def _scores_ahead(
    source: Path, samples: Batch, options: Narrowing, anatomy: Anatomy, *, context: PassContext
) -> list[Tensor]:
    """Return the importance of all units of all blocks, for options that must know it before the first block changes."""
    inner = options.inner(anatomy)
    if options.by_gradient:
        found = unit_gradients(source, samples, context, anatomy, inner.output)
        return [score.view(-1, anatomy.unit(inner)).sum(1) for score in found]
    scores = []
    for seen in survey(source, samples, context, inner.output):
        assert seen.moments is not None
        bias = anatomy.name(seen.index, inner.output, "bias")
        known = seen.moments.finish(centred=bias in seen.tensors)
        output = anatomy.name(seen.index, inner.output)
        turned = {output: seen.tensors[output].T} if anatomy.transposed else {}
        own = unit_scores(options, anatomy, seen.index, {**seen.tensors, **turned}, known, torch.device(context.device))
        # Layers differ in scale, so each unit's importance is its share of its own layer's sum.
        scores.append((own / own.sum().clamp(min=1e-30)).cpu())
    return scores


def _influence(source: Path, samples: Batch, options: Layers, anatomy: Anatomy, *, context: PassContext) -> list[float]:
    """Return the influence of each block."""
    if options.by_gradient:
        return block_gradients(source, samples, context, anatomy)
    return [seen.influence for seen in survey(source, samples, context, None)]


def _bias_of(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"


def _digest(scores: Sequence[Tensor] | None) -> str:
    """Return a hash of the scores. Blocks of an earlier attempt are reused only if its scores were the same."""
    digest = hashlib.sha256()
    for score in scores or ():
        digest.update(tensor_bytes(score.contiguous()))
    return digest.hexdigest()


def _copy_blocks(source: Path, target: Path, anatomy: Anatomy, kept: Sequence[int]) -> None:
    """Copy all tensors but those of removed blocks, shard by shard. The remaining blocks are renumbered from 0."""
    target.mkdir(parents=True, exist_ok=True)
    number = {before: after for after, before in enumerate(kept)}
    files = SourceTensors.in_folder(source)
    for shard in files.shards:
        names = {}
        for tensor in shard.tensors:
            place = anatomy.place(tensor.name)
            if place is None or place[0] in number:
                names[tensor.name] = tensor.name if place is None else renumbered(tensor.name, anatomy, number)
        if not names:
            continue
        infos = [replace(files.stored(old).info, name=new) for old, new in names.items()]
        tensors = ((new, files.read(old)) for old, new in names.items())
        write_tensors(target / shard.path.name, infos, tensors, shard.metadata)
    write_index(target)


def _write_config(target: Path, changed: Mapping[str, Any]) -> None:
    path = target / "config.json"
    written = json.loads(path.read_bytes())
    write_json(path, {**written, **changed})


def _record(
    options: Shrinking,
    context: PassContext,
    target: Path,
    effects: Mapping[str, Effect],
    start: float,
    summary: dict[str, Any],
) -> PassRecord:
    before, after = context.header, inspect_model(FolderFiles(target))
    sizes = {tensor.name: tensor.size for tensor in after.tensors}
    return PassRecord(
        index=context.index,
        name=options.name,
        seconds=time.monotonic() - start,
        summary={
            **summary,
            "parameters_before": before.parameters,
            "parameters_after": after.parameters,
            "bytes_before": before.size,
            "bytes_after": after.size,
        },
        layers=tuple(
            LayerEffect(
                name=tensor.name.removesuffix(".weight"),
                bytes_before=tensor.size,
                bytes_after=sizes[tensor.name],
                relative_error=effects[tensor.name].relative_error,
            )
            for tensor in before.tensors
            if tensor.name in effects
        ),
    )
