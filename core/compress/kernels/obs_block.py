"""One block of columns of the Optimal Brain Surgeon loop, in torch. On CUDA in float32, the kernel of `obs_block_triton` does the same.

Each column of a block depends on the columns before it, but rows do not depend on each other. So the kernel keeps a tile of rows in
registers through all columns. It accesses memory twice: once to read the tile and once to write it.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from nightpress.core.compress.grids.rounding import nearest_floats
from nightpress.core.compress.kernels.column_rules import BlockGrid, BlockMask

_RUN = 16  #: columns whose errors are passed on in one product


def obs_block(
    weight: Tensor,
    spread: Tensor,
    cost: Tensor,
    loss: Tensor,
    grid: BlockGrid | None,
    mask: BlockMask | None,
) -> None:
    """Put the columns of `weight` [..., rows, columns] on the grid and under the mask, in place, from left to right.

    spread [..., columns, columns] is unit upper triangular: the error of column j times spread[j, k] is subtracted from each column k > j.
    cost [..., columns]: how much an error of 1 in a column changes the output. Σ (error · cost)² is added to loss [..., rows]. In a stack,
    with one dimension in front, the weights are settled side by side.
    """
    if weight.is_cuda and weight.dtype == torch.float32:
        from nightpress.core.compress.kernels.obs_block_triton import launch  # triton is installed only with CUDA

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
    if weight.dim() == 3:
        for at in range(len(weight)):
            reference(weight[at], spread[at], cost[at], loss[at], _of_grid(grid, at), _of_mask(mask, at))
        return
    work = weight.t().contiguous()  # [columns, rows]: a column's weights are contiguous
    gone = _mask_of(work, mask)
    pattern = None if mask is None else mask.pattern
    groups = [] if grid is None else grid.group.tolist()
    scales = None if grid is None else grid.scale.t().contiguous()
    zero_points = None if grid is None else grid.zero_point.t().contiguous()
    lost = torch.empty_like(work)
    # Columns are settled in short runs, and the errors of a run are passed on in one product: memory traffic would dominate rank-1 updates.
    run = math.lcm(_RUN, pattern[1]) if pattern is not None else _RUN
    for j, column in enumerate(work):
        run_end = min(j // run * run + run, len(work))
        if pattern is not None and j % pattern[1] == 0:
            assert gone is not None
            _decide(work, cost, j, pattern, gone)
        value = column
        if grid is not None and scales is not None and zero_points is not None:
            scale, zero_point = scales[groups[j]], zero_points[groups[j]]
            if grid.fp4:
                value = nearest_floats(column / scale, 4).mul_(scale)
            else:
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


def _of_grid(grid: BlockGrid | None, at: int) -> BlockGrid | None:
    """The grid of one weight of a stack."""
    if grid is None:
        return None
    return replace(grid, scale=grid.scale[at], zero_point=grid.zero_point[at], group=grid.group[at])


def _of_mask(mask: BlockMask | None, at: int) -> BlockMask | None:
    """The mask of one weight of a stack."""
    return mask if mask is None or mask.given_mask is None else BlockMask(given_mask=mask.given_mask[at])


def _mask_of(work: Tensor, mask: BlockMask | None) -> Tensor | None:
    if mask is None:
        return None
    return torch.zeros_like(work, dtype=torch.bool) if mask.given_mask is None else mask.given_mask.t().contiguous()


def _decide(work: Tensor, cost: Tensor, first: int, pattern: tuple[int, int], gone: Tensor) -> None:
    kept, of = pattern
    score = (work[first : first + of] * cost[first : first + of, None]).square_()
    smallest = score.argsort(dim=0, stable=True)[: of - kept]
    gone[first : first + of].scatter_(0, smallest, True)
