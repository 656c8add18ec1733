"""Fit the ranges of GGUF's blocks to a weight for the least weighted rounding error, and round weights to the nearest codes.

First, each part of a block searches its scale and minimum: several candidates are refitted by least squares to the codes that they give.
Then the k-quants' scales and minima are rounded to integers of 4, 6 or 8 bits, and refined against that rounding: the parts' integers and
the block's two units are fitted again by turns. A block keeps a change only if it lowers its error.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from nightpress.core.compress.grids.gguf_blocks import BlockCoded, BlockRanges
from nightpress.core.compress.grids.grid import SMALLEST_SCALE
from nightpress.core.recipes.gguf_types import GgufType

_CHUNK = 2**18  #: weights that are fitted together on a CPU; their candidates stay in the processor's cache
_SPREADS = 17  #: candidates of a part's range, from a step less than the weights' extremes to a step more
_ROUNDS = 2  #: of refinement
_LEAST_COST = 1e-6  #: of a weight, as a share of the mean


def round_to_blocks(weight: Tensor, kind: GgufType, importance: Tensor | None = None) -> BlockCoded:
    """Round a weight [out, in] float32 to the nearest codes of the fitted ranges. importance: as in `fit_ranges`."""
    ranges = fit_ranges(weight, kind, importance)
    return BlockCoded(kind, nearest_block_codes(weight, kind, ranges), ranges)


def fit_ranges(weight: Tensor, kind: GgufType, importance: Tensor | None = None) -> BlockRanges:
    """Fit the ranges of a weight [out, in] float32.

    importance [in]: what the square of an error in a column costs, e.g. its inputs' power; None: an error counts more in a large weight,
    because large weights contribute more to an output.
    """
    blocks = weight.view(len(weight), -1, kind.block // kind.part, kind.part)  # [out, blocks, parts, part]
    cost = None
    if importance is not None:
        cost = relative_cost(importance).view(1, *blocks.shape[1:])
    fitted = [_fit(rows, _cost(rows, kind) if cost is None else cost, kind) for rows in _chunks(blocks)]
    return _joined(fitted)


def relative_cost(importance: Tensor) -> Tensor:
    """What an error in a column costs, as a share of the mean, and never nothing: [in]. Without any importance, all cost the same."""
    mean = importance.mean()
    return torch.where(mean > 0, (importance / mean).clamp(min=_LEAST_COST), torch.ones_like(importance))


def nearest_block_codes(weight: Tensor, kind: GgufType, ranges: BlockRanges) -> Tensor:
    """The nearest codes of a weight [out, in] float32: uint8 [out, in]."""
    blocks = weight.view(*ranges.scales.shape, kind.part)
    return _codes(blocks, kind, ranges.scale(), ranges.minimum()).to(torch.uint8).view(weight.shape)


def solvable(scale: Tensor) -> Tensor:
    """The scales, and the smallest positive one in place of zero: weights can be divided by it, and its steps are zero beside any weight."""
    return torch.where(scale == 0, SMALLEST_SCALE, scale)


def _joined(parts: list[BlockRanges]) -> BlockRanges:
    """The ranges of a weight whose rows were fitted in parts."""
    unit, scales = torch.cat([part.unit for part in parts]), torch.cat([part.scales for part in parts])
    least_units = [part.least_unit for part in parts if part.least_unit is not None]
    minima = [part.minima for part in parts if part.minima is not None]
    if not minima:
        return BlockRanges(unit, scales)
    return BlockRanges(unit, scales, torch.cat(least_units), torch.cat(minima))


def _chunks(blocks: Tensor) -> Iterator[Tensor]:
    step = len(blocks) if blocks.is_cuda else max(_CHUNK // max(blocks[0].numel(), 1), 1)
    yield from torch.split(blocks, max(step, 1))


def _cost(blocks: Tensor, kind: GgufType) -> Tensor:
    if not kind.minimum:
        return blocks.square() + SMALLEST_SCALE
    return blocks.square().mean(-1, keepdim=True).sqrt() + blocks.abs() + SMALLEST_SCALE


def _codes(blocks: Tensor, kind: GgufType, scale: Tensor, minimum: Tensor | None) -> Tensor:
    """The nearest codes [..., parts, part], as floats from 0 up."""
    moved = blocks if minimum is None else blocks + minimum[..., None]
    steps = (moved / solvable(scale)[..., None]).round_()
    if minimum is None:
        steps += kind.half
    return steps.clamp_(0, 2**kind.bits - 1)


def _error(blocks: Tensor, cost: Tensor, kind: GgufType, scale: Tensor, minimum: Tensor | None) -> Tensor:
    """The weighted squared error of each part [..., parts] with the nearest codes."""
    codes = _codes(blocks, kind, scale, minimum)
    steps = codes if kind.minimum else codes - kind.half
    meant = steps * scale[..., None]
    if minimum is not None:
        meant -= minimum[..., None]
    return meant.sub_(blocks).square_().mul_(cost).sum(-1)


def _fit(blocks: Tensor, cost: Tensor, kind: GgufType) -> BlockRanges:
    """The ranges of rows [out, blocks, parts, part]."""
    scale, minimum = _searched(blocks, cost, kind)
    if kind.scale_bits is None:
        ones = torch.ones(scale.shape, dtype=torch.int32, device=scale.device)
        unit = scale[..., 0].half()
        return BlockRanges(unit, ones) if minimum is None else BlockRanges(unit, ones, minimum[..., 0].half(), ones)
    unit, scales = _in_units(scale, kind)
    best = BlockRanges(unit, scales) if minimum is None else BlockRanges(unit, scales, *_in_units(minimum, kind))
    lost = _error(blocks, cost, kind, best.scale(), best.minimum()).sum(-1)  # [out, blocks]
    now = best
    for _ in range(_ROUNDS):
        now = _refined(blocks, cost, kind, now)
        error = _error(blocks, cost, kind, now.scale(), now.minimum()).sum(-1)
        better = error < lost
        lost = torch.where(better, error, lost)
        best = now.choose(better, best)
    return best


def _searched(blocks: Tensor, cost: Tensor, kind: GgufType) -> tuple[Tensor, Tensor | None]:
    """The best scale and minimum of each part in float32, [out, blocks, parts]."""
    if kind.bits == 8:  # with so many steps the extremes decide
        low, high = blocks.amin(-1), blocks.amax(-1)
        return torch.maximum(-low / kind.half, high / (kind.half - 1)), None
    top = 2**kind.bits - 1
    if kind.minimum:
        low, high = blocks.amin(-1), blocks.amax(-1)
        if kind.scale_bits is not None:
            low, high = low.clamp(max=0), high.clamp(min=0)  # the file can't hold a minimum above zero
        best_scale, best_minimum = (high - low) / top, -low
        width = high - low
    else:
        place = blocks.abs().argmax(-1, keepdim=True)
        extreme = blocks.gather(-1, place)[..., 0]
        best_scale, best_minimum, width = -extreme / kind.half, None, -extreme
    best = _error(blocks, cost, kind, best_scale, best_minimum)
    reach = top if kind.minimum else kind.half
    for spread in torch.linspace(-1.0, 1.0, _SPREADS).tolist():
        codes = _codes(blocks, kind, width / (reach + spread), best_minimum if best_minimum is None else -low)
        scale, minimum = _least_squares(blocks, cost, kind, codes)
        error = _error(blocks, cost, kind, scale, minimum)
        better = error < best
        if kind.minimum:
            better &= scale > 0
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        if minimum is not None and best_minimum is not None:
            best_minimum = torch.where(better, minimum, best_minimum)
    return best_scale, best_minimum


def _least_squares(blocks: Tensor, cost: Tensor, kind: GgufType, codes: Tensor) -> tuple[Tensor, Tensor | None]:
    """The scale and the minimum of each part that fit the codes best."""
    if not kind.minimum:
        steps = codes - kind.half
        weighted = cost * steps
        return _divided((weighted * blocks).sum(-1), (weighted * steps).sum(-1)), None
    weighted = cost * codes
    total, sum_x = cost.sum(-1), (cost * blocks).sum(-1)
    sum_q, sum_qq, sum_xq = weighted.sum(-1), (weighted * codes).sum(-1), (weighted * blocks).sum(-1)
    spread = total * sum_qq - sum_q.square()
    scale = _divided(total * sum_xq - sum_x * sum_q, spread)
    minimum = -_divided(sum_qq * sum_x - sum_q * sum_xq, spread)
    if kind.scale_bits is None:
        return scale, minimum
    through_zero = minimum < 0  # the file can't hold a minimum above zero: it is zero, and only the scale is fitted
    return torch.where(through_zero, _divided(sum_xq, sum_qq), scale), minimum.clamp(min=0)


def _in_units(values: Tensor, kind: GgufType, unit: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round the parts' numbers [out, blocks, parts] to integers → their unit, float16 [out, blocks], and the multiples, int32.

    unit: one that is kept. Types with minima have multiples without a sign.
    """
    assert kind.scale_bits is not None
    lowest, highest = (
        (0, 2**kind.scale_bits - 1) if kind.minimum else (-(2 ** (kind.scale_bits - 1)), 2 ** (kind.scale_bits - 1) - 1)
    )
    if unit is None:
        largest = values.gather(-1, values.abs().argmax(-1, keepdim=True))[..., 0]
        unit = (largest / (highest if kind.minimum else lowest)).half()
    multiples = _divided(values, unit.float()[..., None].expand_as(values)).round_()
    return unit, multiples.clamp_(lowest, highest).int()


def _refined(blocks: Tensor, cost: Tensor, kind: GgufType, ranges: BlockRanges) -> BlockRanges:
    """Fit the parts' multiples to the present codes, then the units to both."""
    codes = _codes(blocks, kind, ranges.scale(), ranges.minimum())
    scale, minimum = _least_squares(blocks, cost, kind, codes)
    _, scales = _in_units(scale, kind, ranges.unit)
    wide = scales.float()[..., None]
    if minimum is None:
        steps = (codes - kind.half) * wide
        weighted = cost * steps
        unit = _divided((weighted * blocks).sum((-1, -2)), (weighted * steps).sum((-1, -2)))
        return BlockRanges(unit.half(), scales)
    assert ranges.least_unit is not None
    _, minima = _in_units(minimum, kind, ranges.least_unit)
    up, down = codes * wide, minima.float()[..., None].expand_as(codes)  # w ≈ unit · up − least_unit · down
    weighted_up, weighted_down = cost * up, cost * down
    both, ups, downs = (
        (a * b).sum((-1, -2)) for a, b in ((weighted_up, down), (weighted_up, up), (weighted_down, down))
    )
    to_up, to_down = (weighted_up * blocks).sum((-1, -2)), (weighted_down * blocks).sum((-1, -2))
    spread = ups * downs - both.square()
    unit = _divided(to_up * downs - to_down * both, spread)
    least = _divided(to_up * both - to_down * ups, spread)
    alone = (least <= 0) | (unit <= 0) | (spread <= 0)
    unit = torch.where(alone, ranges.unit.float(), unit)
    least = torch.where(alone, ranges.least_unit.float(), least)
    return BlockRanges(unit.half(), scales, least.half(), minima)


def _divided(values: Tensor, by: Tensor) -> Tensor:
    """values / by, and zero where `by` is zero."""
    return torch.where(by != 0, values / torch.where(by != 0, by, 1.0), 0.0)
