"""One block of columns of the Optimal-Brain-Surgeon loop, in torch; on CUDA in float32 the Triton kernel beside this file does the same.

Inside a block the columns depend on each other one by one, but the rows of a weight don't depend on each other at all. So the kernel
takes a tile of rows, keeps it in registers through all columns, and touches memory twice: once to read and once to write.
"""

import math

import torch
from torch import Tensor

from nightpress.core.compress.kernels.column_rules import BlockGrid, BlockMask

_RUN = 16  #: columns


def obs_block(
    weight: Tensor,
    spread: Tensor,
    cost: Tensor,
    loss: Tensor,
    grid: BlockGrid | None,
    mask: BlockMask | None,
) -> None:
    """Put the columns of `weight` [rows, columns] on the grid and under the mask, in place, from left to right.

    spread [columns, columns] is unit upper triangular: what column j loses, columns k > j make up for with spread[j, k].
    cost [columns] is what a unit lost in a column does to the output; Σ (lost · cost)² is added to loss [rows].
    """
    if weight.is_cuda and weight.dtype == torch.float32:
        from nightpress.core.compress.kernels.obs_block_triton import launch  # triton is there with CUDA alone

        launch(weight, spread, cost, loss, grid, mask)
    else:
        reference(weight, spread, cost, loss, grid, mask)


def reference(
    weight: Tensor,
    spread: Tensor,
    cost: Tensor,
    loss: Tensor,
    grid: BlockGrid | None,
    mask: BlockMask | None,
) -> None:
    """`obs_block` on any device and in any float dtype."""
    work = weight.t().contiguous()  # [columns, rows]: a column's weights are neighbours
    gone = _told(work, mask)
    pattern = None if mask is None else mask.pattern
    groups = [] if grid is None else grid.group.tolist()
    scales = None if grid is None else grid.scale.t().contiguous()
    zero_points = None if grid is None else grid.zero_point.t().contiguous()
    lost = torch.empty_like(work)
    # Columns settle in short runs, and what a run lost is passed on in one product: a rank at a time would be all memory traffic.
    run = math.lcm(_RUN, pattern[1]) if pattern is not None else _RUN
    for j, column in enumerate(work):
        run_end = min(j // run * run + run, len(work))
        if pattern is not None and j % pattern[1] == 0:
            assert gone is not None
            _decide(work, cost, j, pattern, gone)
        value = column
        if grid is not None and scales is not None and zero_points is not None:
            scale, zero_point = scales[groups[j]], zero_points[groups[j]]
            code = torch.round(column / scale).add_(zero_point).clamp_(grid.lowest, grid.highest)
            value = code.sub_(zero_point).mul_(scale)
        if gone is not None:
            value = value.masked_fill(gone[j], 0)
        torch.sub(column, value, out=lost[j])
        work[j] = value
        work[j + 1 : run_end].addr_(spread[j, j + 1 : run_end], lost[j], alpha=-1)
        if j + 1 == run_end:
            settled = slice(j // run * run, run_end)
            work[run_end:].addmm_(spread[settled, run_end:].T, lost[settled], alpha=-1)
    loss += (lost * cost[:, None]).square_().sum(0)
    weight.copy_(work.t())


def _told(work: Tensor, mask: BlockMask | None) -> Tensor | None:
    if mask is None:
        return None
    return torch.zeros_like(work, dtype=torch.bool) if mask.told is None else mask.told.t().contiguous()


def _decide(work: Tensor, cost: Tensor, first: int, pattern: tuple[int, int], gone: Tensor) -> None:
    kept, of = pattern
    score = (work[first : first + of] * cost[first : first + of, None]).square_()
    smallest = score.argsort(dim=0, stable=True)[: of - kept]
    gone[first : first + of].scatter_(0, smallest, True)
