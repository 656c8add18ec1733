"""Triton kernels of learned rounding. Imported on a CUDA machine only.

Bytes for each weight: 12 to round it (the weight and its offset are read, ŵ is written), and 16 for a step (a gradient in float32, the weight
and the offset are read, the offset is written). Codes are never written: a step rounds once more.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import libdevice

from nightpress.core.compress.grids.grid import Grid

_TILE = 4096  #: weights a program holds


def rounded(weight: Tensor, offset: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """Return ŵ. Tensors are contiguous float32: weight, offset and result [out, groups, width], scale and zero_point [out, groups]."""
    result = torch.empty_like(weight)
    with torch.cuda.device(weight.device):
        _round_kernel[(triton.cdiv(weight.numel(), _TILE),)](
            weight,
            offset,
            scale,
            scale if zero_point is None else zero_point,
            result,
            weight.numel(),
            weight.shape[-1],
            TOP=grid.top,
            FP4=grid.is_fp4,
            ZERO=zero_point is not None,
            TILE=_TILE,
            num_warps=4,
        )
    return result


def descend(
    gradient: Tensor, weight: Tensor, offset: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid, rate: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Move the offsets against a gradient [out, groups, width] of ŵ, in any float dtype. The other tensors are those of `rounded`.

    Returns the sums over each group of g·q, g·i·w, g and g·i (see `learned_rounding`), float32 [out, groups].
    """
    groups, width = scale.numel(), weight.shape[-1]
    block = min(triton.next_power_of_2(width), _TILE)
    count = max(1, _TILE // block)  # groups a program holds
    sums = torch.empty(4, *scale.shape, device=weight.device)
    gradient = gradient.contiguous()
    with torch.cuda.device(weight.device):
        _step_kernel[(triton.cdiv(groups, count),)](
            gradient,
            weight,
            offset,
            scale,
            scale if zero_point is None else zero_point,
            sums,
            rate,
            groups,
            width,
            TOP=grid.top,
            FP4=grid.is_fp4,
            ZERO=zero_point is not None,
            COUNT=count,
            BLOCK=block,
            num_warps=4,
        )
    by_codes, by_weights, total, inside = sums
    return by_codes, by_weights, total, inside


@triton.jit
def _codes(weight, offset, scale, zero, TOP: tl.constexpr, FP4: tl.constexpr, ZERO: tl.constexpr):
    """The codes, and whether each is not clamped. Divisions and roundings are torch's, so that all codes are."""
    steps = tl.div_rn(weight, scale)
    if FP4:
        size = tl.abs(steps)
        moved = steps + tl.where(size < 2, 0.5, tl.where(size < 4, 1.0, 2.0)) * offset
        size = tl.abs(moved)
        low = tl.where(size <= 0.25, 0.0, tl.where(size <= 0.75, 0.5, tl.where(size <= 1.25, 1.0, 1.5)))
        high = tl.where(size <= 2.5, 2.0, tl.where(size <= 3.5, 3.0, tl.where(size <= 5.0, 4.0, 6.0)))
        number = tl.where(size <= 1.75, low, high)
        codes = tl.where(moved < 0, -number, number)
        free = size <= 6.0
    else:
        wanted = libdevice.rint(steps + offset)
        if ZERO:
            wanted += zero
        codes = tl.minimum(tl.maximum(wanted, -TOP), TOP - 1)
        free = codes == wanted
    return codes, free


@triton.jit
def _round_kernel(
    weight, offset, scale, zero, result, total, width,
    TOP: tl.constexpr, FP4: tl.constexpr, ZERO: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    real = at < total
    group = at // width
    step = tl.load(scale + group, mask=real, other=1.0)
    shift = tl.load(zero + group, mask=real, other=0.0) if ZERO else step
    values = tl.load(weight + at, mask=real, other=0.0)
    codes, _ = _codes(values, tl.load(offset + at, mask=real, other=0.0), step, shift, TOP, FP4, ZERO)
    if ZERO:
        codes -= shift
    tl.store(result + at, codes * step, mask=real)


@triton.jit
def _step_kernel(
    gradient, weight, offset, scale, zero, sums, rate, groups, width,
    TOP: tl.constexpr, FP4: tl.constexpr, ZERO: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    mine = group < groups
    step = tl.load(scale + group, mask=mine, other=1.0)
    shift = tl.load(zero + group, mask=mine, other=0.0) if ZERO else step
    by_codes = tl.zeros((COUNT,), tl.float32)
    by_weights = tl.zeros((COUNT,), tl.float32)
    all_sum = tl.zeros((COUNT,), tl.float32)
    inside_sum = tl.zeros((COUNT,), tl.float32)
    for begin in range(0, width, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        at = group[:, None] * width + column[None, :]
        real = mine[:, None] & (column < width)[None, :]
        values = tl.load(weight + at, mask=real, other=0.0)
        before = tl.load(offset + at, mask=real, other=0.0)
        slope = tl.load(gradient + at, mask=real, other=0.0).to(tl.float32)
        codes, free = _codes(values, before, step[:, None], shift[:, None], TOP, FP4, ZERO)
        inside = tl.where(free, slope, 0.0)
        by_codes += tl.sum(slope * codes, 1)
        by_weights += tl.sum(inside * values, 1)
        all_sum += tl.sum(slope, 1)
        inside_sum += tl.sum(inside, 1)
        moves = inside * step[:, None]  # a scale may be negative
        sign = tl.where(moves > 0, 1.0, tl.where(moves < 0, -1.0, 0.0))
        after = tl.minimum(tl.maximum(before - rate * sign, -0.5), 0.5)
        tl.store(offset + at, after, mask=real)
    tl.store(sums + group, by_codes, mask=mine)
    tl.store(sums + groups + group, by_weights, mask=mine)
    tl.store(sums + 2 * groups + group, all_sum, mask=mine)
    tl.store(sums + 3 * groups + group, inside_sum, mask=mine)
