"""The Triton kernel of `obs_block`. Imported on a CUDA machine only.

Bytes: a tile is read and written once, so a block of 128 columns moves rows · 1 KiB. Time: the 128 columns run one after the other, and
each is a reduction over a warp (about 250 cycles). This makes 20 µs for a block, for any number of rows that the GPU can hold at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import libdevice

from nightpress.core.compress.kernels.column_rules import BlockGrid, BlockMask

_ROWS = 16  #: rows a program holds
_WARPS = 4


def launch(
    weight: Tensor,
    spread: Tensor,
    cost: Tensor,
    loss: Tensor,
    grid: BlockGrid | None,
    mask: BlockMask | None,
) -> None:
    """Start the kernel for `obs_block`'s arguments: float32 on one CUDA device, with contiguous columns in each tensor.

    In a stack, every tensor but the groups of columns is contiguous.
    """
    if weight.dim() == 2:
        weight, spread, cost, loss = weight[None], spread[None], cost[None], loss[None]
    count, rows, columns = weight.shape
    row_tiles = triton.cdiv(rows, _ROWS)
    given_mask = mask.given_mask if mask is not None else None
    kept, of = (mask.pattern if mask is not None else None) or (0, 0)
    nothing = weight  # a placeholder for arguments that the compiled variant never reads
    with torch.cuda.device(weight.device):
        _kernel[(row_tiles * count,)](
            weight,
            weight.stride(1),
            weight.stride(0),
            spread,
            spread.stride(1),
            spread.stride(0),
            cost,
            cost.stride(0),
            loss,
            nothing if grid is None else grid.scale,
            nothing if grid is None else grid.zero_point,
            0 if grid is None else grid.scale.stride(-2),
            nothing if grid is None else grid.group,
            0 if grid is None or grid.group.dim() == 1 else grid.group.stride(0),
            0.0 if grid is None else float(grid.lowest),
            0.0 if grid is None else float(grid.highest),
            nothing if given_mask is None else given_mask,
            0 if given_mask is None else given_mask.stride(-2),
            row_tiles,
            rows,
            columns,
            ROWS=_ROWS,
            WIDTH=triton.next_power_of_2(columns),
            HAS_GRID=grid is not None,
            FP4=grid is not None and grid.fp4,
            HAS_TOLD=given_mask is not None,
            KEPT=kept,
            OF=of,
            num_warps=_WARPS,
        )


@triton.jit
def _nearest_fp4(values):
    """The nearest numbers of e2m1. A tie becomes the smaller magnitude, as in `nearest_floats`."""
    size = tl.abs(values)
    number = tl.where(size > 0.25, 0.5, 0.0) + tl.where(size > 0.75, 0.5, 0.0) + tl.where(size > 1.25, 0.5, 0.0)
    number += tl.where(size > 1.75, 0.5, 0.0) + tl.where(size > 2.5, 1.0, 0.0) + tl.where(size > 3.5, 1.0, 0.0)
    number += tl.where(size > 5.0, 2.0, 0.0)
    return tl.where(values < 0, -number, number)


@triton.jit
def _kernel(
    weight,
    weight_stride,
    weight_step,
    spread,
    spread_stride,
    spread_step,
    cost,
    cost_step,
    loss,
    scale,
    zero_point,
    scale_stride,
    group,
    group_step,
    lowest,
    highest,
    given_mask,
    told_stride,
    row_tiles,
    rows,
    columns,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_GRID: tl.constexpr,
    FP4: tl.constexpr,
    HAS_TOLD: tl.constexpr,
    KEPT: tl.constexpr,
    OF: tl.constexpr,
):
    matrix = (tl.program_id(0) // row_tiles).to(tl.int64)  # the weight's place in the stack
    row = (tl.program_id(0) % row_tiles) * ROWS + tl.arange(0, ROWS)
    wide_row = matrix * rows + row  # among the rows of all weights
    spread += matrix * spread_step
    cost += matrix * cost_step
    group += matrix * group_step
    column = tl.arange(0, WIDTH)
    real_row = row < rows
    real = real_row[:, None] & (column < columns)[None, :]
    place = weight + matrix * weight_step + row.to(tl.int64)[:, None] * weight_stride + column[None, :]
    tile = tl.load(place, mask=real, other=0.0)  # [ROWS, WIDTH]
    costs = tl.load(cost + column, mask=column < columns, other=0.0)
    bill = tl.zeros([ROWS], dtype=tl.float32)
    # The pruned columns of the current N:M group; its first column is the lowest bit.
    gone_bits = tl.zeros([ROWS], dtype=tl.int32)
    for j in range(columns):
        if OF > 0:  # noqa: SIM102 (evaluated at compile time, so that no remainder by 0 is compiled)
            if j % OF == 0:
                inside = ((column >= j) & (column < j + OF))[None, :]
                dear = tile * costs[None, :]
                score = tl.where(inside, dear * dear, float("inf"))
                gone_bits = tl.zeros([ROWS], dtype=tl.int32)
                for _ in tl.static_range(OF - KEPT):
                    smallest = tl.argmin(score, axis=1)
                    gone_bits = gone_bits | (1 << (smallest - j))
                    score = tl.where(column[None, :] == smallest[:, None], float("inf"), score)
        here = (column == j)[None, :]
        before = tl.sum(tl.where(here, tile, 0.0), axis=1)  # [ROWS]: column j, which compensates for earlier columns
        after = before
        if HAS_GRID:
            at = wide_row * scale_stride + tl.load(group + j)
            step = tl.load(scale + at, mask=real_row, other=1.0)
            if FP4:
                after = _nearest_fp4(tl.div_rn(before, step)) * step
            else:
                zero = tl.load(zero_point + at, mask=real_row, other=0.0)
                code = libdevice.rint(tl.div_rn(before, step)) + zero
                code = tl.minimum(tl.maximum(code, lowest), highest)
                after = (code - zero) * step
        if HAS_TOLD:
            gone = tl.load(given_mask + wide_row * told_stride + j, mask=real_row, other=0)
            after = tl.where(gone != 0, 0.0, after)
        if OF > 0:
            after = tl.where(((gone_bits >> (j % OF)) & 1) != 0, 0.0, after)
        lost = before - after
        price = lost * tl.load(cost + j)
        bill += price * price
        shares = tl.load(spread + j * spread_stride + column, mask=(column > j) & (column < columns), other=0.0)
        tile = tl.where(here, after[:, None], tile - lost[:, None] * shares[None, :])
    tl.store(place, tile, mask=real)
    tl.store(loss + wide_row, tl.load(loss + wide_row, mask=real_row, other=0.0) + bill, mask=real_row)
