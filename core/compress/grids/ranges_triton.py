"""The Triton kernel of the range search. Imported on a CUDA machine only.

Bytes: the weight is read once, and two numbers are written for each group. Arithmetic: about ten operations for each weight and range.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import libdevice

from nightpress.core.compress.grids.grid import Grid

_TILE = 4096  #: weights a program holds
_WORDS = {
    torch.bfloat16: (tl.bfloat16, tl.int16),
    torch.float16: (tl.float16, tl.int16),
    torch.float32: (tl.float32, tl.int32),
}


def launch(
    weight: Tensor, grid: Grid, stored: torch.dtype, importance: Tensor, shrinks: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """Start the kernel for `find_ranges`' arguments: a float32 weight on a CUDA device, with contiguous columns."""
    each, columns = weight.shape[-2:]
    flat = weight.reshape(-1, columns)
    rows, groups = len(flat), grid.groups(columns)
    width = triton.next_power_of_2(columns // groups)
    count = max(1, _TILE // width)  # groups a program holds
    scale = torch.empty(*weight.shape[:-1], groups, device=weight.device)
    zero_point = torch.empty_like(scale)
    held, word = _WORDS[stored]
    with torch.cuda.device(weight.device):
        _kernel[(triton.cdiv(rows * groups, count),)](
            flat,
            flat.stride(0),
            importance.float().contiguous(),
            scale,
            zero_point,
            torch.tensor(shrinks, device=weight.device),
            rows * groups,
            groups,
            columns // groups,
            each * groups,
            columns,
            TOP=grid.top,
            SYMMETRIC=grid.symmetric,
            MIRRORS=grid.mirrors,
            TRIES=len(shrinks),
            COUNT=count,
            WIDTH=width,
            HELD=held,
            WORD=word,
            num_warps=4,
        )
    return scale, zero_point


@triton.jit
def _round_up(scale, HELD: tl.constexpr, WORD: tl.constexpr):
    scale = tl.maximum(scale, 7.888609052210118e-31)  # 2^-100: its reciprocal is still finite
    held = scale.to(HELD)
    above = (held.to(WORD, bitcast=True) + 1).to(HELD, bitcast=True)  # the next bit pattern is the next larger number
    return tl.where(held.to(tl.float32) < scale, above.to(tl.float32), held.to(tl.float32))


@triton.jit
def _kernel(
    weight,
    weight_stride,
    importance,
    scale_out,
    zero_out,
    shrinks,
    total,
    groups,
    size,
    each,
    columns,
    TOP: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    MIRRORS: tl.constexpr,
    TRIES: tl.constexpr,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
    HELD: tl.constexpr,
    WORD: tl.constexpr,
):
    which = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    inside = tl.arange(0, WIDTH)
    real = (which < total)[:, None] & (inside < size)[None, :]
    column = (which % groups)[:, None] * size + inside[None, :]
    tile = tl.load(weight + (which // groups).to(tl.int64)[:, None] * weight_stride + column, mask=real, other=0.0)
    matrix = (which // each).to(tl.int64)[:, None]
    weigh = tl.load(importance + matrix * columns + column, mask=real, other=0.0)
    low = tl.minimum(tl.min(tile, axis=1), 0.0)
    high = tl.maximum(tl.max(tile, axis=1), 0.0)
    least = tl.full([COUNT], float("inf"), tl.float32)
    best_scale = tl.zeros([COUNT], tl.float32)
    best_zero = tl.zeros([COUNT], tl.float32)
    for at in range(TRIES):
        shrink = tl.load(shrinks + at)
        if SYMMETRIC:
            turned = (high > -low) & MIRRORS
            lowest = tl.where(turned, -high, low)
            highest = tl.where(turned, -low, high)
            below = tl.div_rn(-lowest * shrink, tl.full([COUNT], TOP * 1.0, tl.float32))
            above = tl.div_rn(highest * shrink, tl.full([COUNT], TOP - 0.5, tl.float32))
            size_of_step = _round_up(tl.maximum(below, above), HELD, WORD)
            scale = tl.where(turned, -size_of_step, size_of_step)
            zero = tl.zeros([COUNT], tl.float32)
        else:
            spread = high * shrink - low * shrink
            scale = _round_up(tl.div_rn(spread, tl.full([COUNT], 2.0 * TOP - 1.0, tl.float32)), HELD, WORD)
            zero = libdevice.rint(-TOP - tl.div_rn(low * shrink, scale))
            zero = tl.minimum(tl.maximum(zero, -TOP * 1.0), TOP - 1.0)
        steps = tile * (1.0 / scale)[:, None]
        nearest = libdevice.rint(steps)
        nearest = tl.minimum(tl.maximum(nearest, (-TOP - zero)[:, None]), (TOP - 1 - zero)[:, None])
        lost = steps - nearest
        error = tl.sum(lost * lost * weigh, axis=1) * scale * scale
        better = error < least
        least = tl.where(better, error, least)
        best_scale = tl.where(better, scale, best_scale)
        best_zero = tl.where(better, zero, best_zero)
    tl.store(scale_out + which, best_scale, mask=which < total)
    tl.store(zero_out + which, best_zero, mask=which < total)
