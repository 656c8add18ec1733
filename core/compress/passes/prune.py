"""Magnitude pruning: one or more sweeps over the weights, without calibration data."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.executors.rewrite import Effect, Put
from nightpress.core.compress.executors.stream import scan, sweep
from nightpress.core.compress.grids.workspace import Workspace
from nightpress.core.compress.model.checkpoint import Shard, StoredTensor, read_shards
from nightpress.core.compress.model.companions import copy_companions
from nightpress.core.compress.passes.registry import folder_pass
from nightpress.core.compress.passes.zeros import with_storage
from nightpress.core.compress.solvers.threshold import (
    LOWER_BINS,
    UPPER_BINS,
    Threshold,
    count_lower,
    count_upper,
    locate,
    magnitude_keys,
    pattern_mask,
)
from nightpress.core.handoff.report import LayerEffect, PassRecord
from nightpress.core.recipes.header import TensorInfo
from nightpress.core.recipes.linears import is_linear_weight
from nightpress.core.recipes.passes import Magnitude

#: (tensor, first row of a chunk) → number of weights equal to the threshold in earlier chunks
Ties = dict[tuple[str, int], int]
Span = tuple[float, float]


@folder_pass(Magnitude)
def magnitude(source: Path, target: Path, options: Magnitude, context: PassContext) -> PassRecord:
    """Set an exact number of weights to zero, those of smallest magnitude. `target` becomes a dense model of the same size."""
    start = time.monotonic()
    shards = read_shards(source)
    tensors = {tensor.name: tensor.info for shard in shards for tensor in shard.tensors}
    linears = {name for name, info in tensors.items() if is_linear_weight(info, options.ignore)}
    chosen: dict[str, tuple[Threshold, Ties]] = {}
    if options.pattern == "unstructured":
        pools = [linears] if options.across == "global" else [{name} for name in sorted(linears)]
        for at, pool in enumerate(pools):
            span = (0.7 * at / len(pools), 0.7 * (at + 1) / len(pools))
            chosen |= dict.fromkeys(pool, _select(shards, pool, options.sparsity, context, span))

    def choose(info: TensorInfo) -> "Unstructured | Pattern | None":
        if info.name not in linears:
            return None
        if options.pattern != "unstructured":
            kept, group = (int(part) for part in options.pattern.split(":"))
            return Pattern(info, kept, group)
        return Unstructured(info, *chosen[info.name])

    swept = sweep(source, target, choose, context, recipe=options.model_dump_json(), span=(0.7 if chosen else 0.0, 1.0))
    copy_companions(source, target)
    counts = {name: tensors[name].shape[0] * tensors[name].shape[1] for name in swept.effects}
    total = sum(swept.effects.values(), Effect())
    record = PassRecord(
        index=context.index,
        name=options.name,
        seconds=time.monotonic() - start,
        summary={
            "pattern": options.pattern,
            "across": options.across,
            "layers": len(counts),
            "weights": sum(counts.values()),
            "zeros": total.zeros,
            "sparsity": total.zeros / max(1, sum(counts.values())),
            "relative_error": total.relative_error,
            "bytes_before": sum(info.size for info in tensors.values()),
            "bytes_after": sum(info.size for info in tensors.values()),
        },
        layers=tuple(
            LayerEffect(
                name=name.removesuffix(".weight"),
                bytes_before=tensors[name].size,
                bytes_after=tensors[name].size,
                relative_error=effect.relative_error,
                sparsity=effect.zeros / counts[name],
            )
            for name, effect in swept.effects.items()
        ),
    )
    return with_storage(record, source, target)


@dataclass(frozen=True)
class Unstructured:
    """Sets the weights below a threshold to zero, at any position."""

    info: TensorInfo
    threshold: Threshold
    ties_before: Ties  #: empty if all weights that equal the threshold stay

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        return (self.info,)

    row_step = 1

    def __call__(self, rows: Tensor, first_row: int, put: Put, workspace: Workspace) -> Effect:
        del workspace
        keys = magnitude_keys(rows)
        gone = keys < self.threshold.key
        left = self.threshold.ties - self.ties_before.get((self.info.name, first_row), 0)
        if left > 0:
            places = (keys == self.threshold.key).view(-1).nonzero()[:left]
            gone.view(-1)[places] = True
        return _write_zeros(self.info, rows, gone, first_row, put)


@dataclass(frozen=True)
class Pattern:
    """Keeps the `kept` largest of every `group` neighbours in a row, and sets the others to zero."""

    info: TensorInfo
    kept: int
    group: int

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        return (self.info,)

    row_step = 1

    def __call__(self, rows: Tensor, first_row: int, put: Put, workspace: Workspace) -> Effect:
        del workspace
        return _write_zeros(self.info, rows, pattern_mask(magnitude_keys(rows), self.kept, self.group), first_row, put)


def _write_zeros(info: TensorInfo, rows: Tensor, gone: Tensor, first_row: int, put: Put) -> Effect:
    wide = rows.double()
    norm = float(wide.square().sum())
    error = float(wide[gone].square().sum())
    pruned = rows.masked_fill(gone, 0)
    put(info.name, first_row * pruned[0].nbytes, pruned)
    return Effect(error, norm, zeros=int((pruned == 0).sum()))


def _select(
    shards: tuple[Shard, ...], names: set[str], sparsity: float, context: PassContext, span: Span
) -> tuple[Threshold, Ties]:
    """Return the threshold that prunes `sparsity` of the weights of all named tensors together, and the ties before each chunk.

    The number of pruned weights is exact: the share is rounded to the nearest count. At least one weight stays. Reads the weights two or
    three times: the histogram of the keys' upper bits, that of the lower bits, and the ties if some of them go.
    """
    start, end = span
    step = (end - start) / 3
    upper = _count(shards, names, count_upper, UPPER_BINS, context, (start, start + step))
    total = int(upper.sum())
    # If k weights go, the threshold is the key of the weight of rank k: the smallest that stays.
    high, rank = locate(upper, min(int(sparsity * total + 0.5), total - 1))
    lower = _count(
        shards, names, lambda keys: count_lower(keys, high), LOWER_BINS, context, (start + step, start + 2 * step)
    )
    low, ties = locate(lower, rank)
    threshold = Threshold(key=high << 16 | low, ties=ties)
    return threshold, _ties_before(shards, names, threshold, context, (start + 2 * step, end)) if ties else {}


def _count(
    shards: tuple[Shard, ...],
    names: set[str],
    count: Callable[[Tensor], Tensor],
    bins: int,
    context: PassContext,
    span: Span,
) -> Tensor:
    lock, counts = threading.Lock(), torch.zeros(bins, dtype=torch.int64)

    def visit(_stored: StoredTensor, _first_row: int, rows: Tensor, _workspace: Workspace) -> None:
        found = count(magnitude_keys(rows))
        with lock:
            counts.add_(found)

    scan(shards, names, visit, context, span=span)
    return counts


def _ties_before(
    shards: tuple[Shard, ...], names: set[str], threshold: Threshold, context: PassContext, span: Span
) -> Ties:
    """Return for each chunk the number of weights equal to the threshold in the chunks before it, in the order of the files."""
    found: Ties = {}

    def visit(stored: StoredTensor, first_row: int, rows: Tensor, _workspace: Workspace) -> None:
        found[stored.name, first_row] = int((magnitude_keys(rows) == threshold.key).sum())

    scan(shards, names, visit, context, span=span)
    order = {tensor.name: place for place, tensor in enumerate(tensor for shard in shards for tensor in shard.tensors)}
    before: Ties = {}
    seen = 0
    for chunk in sorted(found, key=lambda chunk: (order[chunk[0]], chunk[1])):
        before[chunk] = seen
        seen += found[chunk]
    return before
