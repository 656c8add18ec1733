"""One Optimal Brain Surgeon solver for quantization (GPTQ), pruning (SparseGPT) and both at once.

A row w of a weight becomes q so that ‖(w − q)X‖² = (w − q)H(w − q)ᵀ is small, where H = Σ xxᵀ over the calibration tokens. Let H = RRᵀ with
R upper triangular. Then this error is ‖(w − q)R‖², and column j of (w − q)R depends only on the columns up to j. So the columns are settled
(set to their final values) from left to right. Each column first compensates for the errors of the columns before it.

The published algorithm uses a triangular factor of H's inverse. This code uses a triangular factor of H, which gives the same result since
[inverse of H from column j on]_jj = 1/R_jj². That takes a third of the arithmetic, and H is never inverted.

For a weight [m, n], the factor takes n³/6 multiply-adds, once for all weights with the same inputs. Passing errors on to later columns
takes m·n²/2. Errors are passed on in blocks of 128 and 1024 columns, so that nearly all of this work is matrix products.

Weights of one shape with inputs of their own, such as a mixture's experts, may be stacked along a dimension in front: [..., out, in] below.
They are settled side by side, because a GPU would spend most of the time waiting for the many small operations of each.

Frantar et al., GPTQ (arXiv 2210.17323), eq. 2–3; SparseGPT (arXiv 2301.00774), algorithm 1.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nightpress.core.compress.grids.grid import Grid
from nightpress.core.compress.grids.ranges import find_ranges, half_quadratic
from nightpress.core.compress.grids.rounding import nearest_codes
from nightpress.core.compress.kernels.column_rules import BlockGrid, BlockMask
from nightpress.core.compress.kernels.obs_block import obs_block
from nightpress.core.compress.ranks.group import ALONE, Group
from nightpress.core.compress.solvers.gram import damped_cholesky
from nightpress.core.compress.solvers.products import add_product
from nightpress.core.compress.solvers.threshold import count_lower, count_upper, locate
from nightpress.core.errors import ErrorCode, NightpressError

_BLOCK = 128  #: columns that one call of the kernel settles
_OUTER = 1024  #: columns whose errors are passed on to all later columns in one product


@dataclass(frozen=True)
class Quantize:
    """Settle weights on a grid of integers or fp4.

    If a group is no wider than a block, its range is found when its columns are reached, from weights that already compensate for earlier
    errors. If groups are wider, or if columns are settled out of order, all ranges are found in advance from the original weight.
    """

    grid: Grid
    stored: torch.dtype  #: dtype of the scales
    ranges: str = "extremes"  #: or `least-error`, weighted by the inputs' power, or `half-quadratic`
    #: Scales and zero points [..., out, groups] of the original weight, if they are known. Used where ranges are found in advance.
    known: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Prune:
    """Settle a share of the weights at zero: in every block of columns the weights that cost least, or by an N:M pattern in each row."""

    sparsity: float
    pattern: tuple[int, int] | None = None  #: (kept, of)


@dataclass(frozen=True)
class Factor:
    """The factor of a Gram matrix. All weights with the same inputs share it."""

    upper: Tensor  #: [..., in, in], R of H + damping · I = RRᵀ, in the order in which columns are settled
    power: Tensor  #: [..., in], the diagonal of H without damping, in the original order of the columns
    damping: Tensor  #: [...], the number that was added to H's diagonal
    order: Tensor | None  #: [..., in], the columns in the order in which they are settled; None: from left to right

    def ordered(self, values: Tensor) -> Tensor:
        """Put the columns of values [..., rows, in] in the order in which they are settled."""
        return values if self.order is None else values.take_along_dim(self.order[..., None, :], -1)


@dataclass(frozen=True)
class Solved:
    """A settled weight. Codes, scales and zero points are None if there was no grid."""

    weight: Tensor  #: [..., out, in], on the grid and under the mask
    loss: Tensor  #: [..., out], (w − q)H(w − q)ᵀ of each row, where H includes the damping
    codes: Tensor | None = None  #: [..., out, in], int8 or numbers of e2m1 in the weight's dtype
    scale: Tensor | None = None  #: [..., out, groups], in the stored dtype
    zero_point: Tensor | None = None  #: int8 [..., out, groups]; None if the grid is symmetric


def factorize(gram: Tensor, *, damping: float = 0.01, by_power: bool = False, group: Group = ALONE) -> Factor:
    """Factor a Gram matrix [..., in, in], float32 or float64, with `damping` times its mean diagonal added. `gram` is not changed.

    by_power: settle the columns with the strongest inputs first, while most other columns can still compensate for their errors
    ("activation order"). group: processes that hold the same `gram`, and factor it together if that pays. Raises
    NightpressError(numerical_failure) if `gram` holds NaN or infinity, or stays indefinite with a thousandfold
    damping.
    """
    power = gram.diagonal(dim1=-2, dim2=-1).clone()
    mean = power.mean(-1)
    if not bool(torch.isfinite(mean).all()):
        raise _failure("The inputs of a layer hold NaN or infinity during calibration.")
    order = torch.argsort(power, descending=True, stable=True) if by_power else None
    # Rotate H by 180°: the lower factor of the rotated matrix, rotated back, is R.
    if order is None:
        turned = gram.flip(-2, -1)
    else:
        backwards = order.flip(-1)
        turned = gram.take_along_dim(backwards[..., None], -2).take_along_dim(backwards[..., None, :], -1)
    # If there were no tokens, H is zero. Any positive damping then makes the columns independent of each other.
    lower, added = damped_cholesky(turned, torch.where(mean > 0, damping * mean, torch.ones_like(mean)), group)
    return Factor(upper=lower.flip(-2, -1), power=power, damping=added, order=order)


def hand_round(own: Factor | None, gram: Tensor, owner: int, group: Group, *, by_power: bool) -> Factor:
    """The factor of a Gram matrix [..., in, in] that one process, the owner, has computed. own: None in all other processes."""
    if own is None:
        shape = gram.shape[:-1]
        order = torch.empty(shape, dtype=torch.long, device=gram.device) if by_power else None
        own = Factor(torch.empty_like(gram), gram.new_empty(shape), gram.new_empty(shape[:-1]), order)
    for tensor in (own.upper, own.power, own.damping, *(() if own.order is None else (own.order,))):
        group.hand_round(tensor.contiguous(), owner)  # the owner's may be a transposed one
    return own


def solve(
    weight: Tensor,
    factor: Factor,
    quantize: Quantize | None = None,
    prune: Prune | None = None,
    group: Group = ALONE,
) -> Solved:
    """Settle a weight [..., out, in] column by column. It must have the factor's dtype and device. `weight` is not changed.

    Weights with the same inputs may be stacked along the rows, since rows do not depend on each other. The exception is unstructured
    pruning, whose quota holds for all rows of a block together. group: processes that settle the other rows of the same weight [out, in];
    the quota then holds for the rows of all. Raises ValueError for an N:M pattern if the factor reorders the columns,
    and NightpressError(numerical_failure) if the error becomes NaN or infinite.
    """
    if factor.order is not None and prune is not None and prune.pattern is not None:
        raise ValueError("a pattern N:M needs its columns in their own order")
    columns = weight.shape[-1]
    settled = weight.clone() if factor.order is None else factor.ordered(weight)
    ranges = None if quantize is None else _Ranges(weight, factor, quantize)
    block = _BLOCK if ranges is None else ranges.block
    if prune is not None and prune.pattern is not None:
        block = math.lcm(block, prune.pattern[1])  # the neighbours of a pattern must be in the same block
    outer_width = max(_OUTER // block, 1) * block
    rows = 0 if prune is None else group.total(weight.shape[-2])
    cost = factor.upper.diagonal(dim1=-2, dim2=-1).contiguous()
    inverses = _inverse_blocks(factor.upper, block)
    loss = settled.new_zeros(settled.shape[:-1])
    # (w − q)R over the settled columns: the error that later columns must compensate for
    owed = torch.zeros_like(settled)
    for outer in range(0, columns, outer_width):
        outer_end = min(outer + outer_width, columns)
        lost = settled.new_empty(*settled.shape[:-1], outer_end - outer)
        for start in range(outer, outer_end, block):
            end = min(start + block, outer_end)
            here, later = slice(start, end), slice(end, outer_end)
            inverse = inverses[start // block]
            now = settled[..., here].clone(memory_format=torch.contiguous_format)
            add_product(now, owed[..., here], inverse)
            grid = None if ranges is None else ranges.of_block(now, start, end)
            cost_here = cost[..., here].contiguous()
            spread = (inverse * cost_here[..., None]).contiguous()
            obs_block(now, spread, cost_here, loss, grid, _block_mask(now, cost_here, prune, rows, group))
            lost_here = torch.sub(settled[..., here], now, out=lost[..., start - outer : end - outer])
            settled[..., here] = now
            add_product(owed[..., later], lost_here, factor.upper[..., here, later])
        add_product(owed[..., outer_end:], lost, factor.upper[..., outer:outer_end, outer_end:])
    del owed
    if factor.order is not None:
        settled = torch.empty_like(settled).scatter_(-1, factor.order[..., None, :].expand_as(settled), settled)
    if not bool(torch.isfinite(loss).all()):
        raise _failure("A weight left the finite numbers while it was settled.")
    return Solved(weight=settled, loss=loss) if ranges is None else ranges.encode(settled, loss)


class _Ranges:
    """The scales and zero points of one weight, found in advance or block by block; see `Quantize`."""

    def __init__(self, weight: Tensor, factor: Factor, quantize: Quantize) -> None:
        self._quantize, self._power = quantize, factor.power
        columns = weight.shape[-1]
        self._width = quantize.grid.group_size or columns
        self._as_they_come = factor.order is None and self._width <= _BLOCK
        self.block = self._width if self._as_they_come else _BLOCK
        group = torch.arange(columns, device=weight.device) // self._width
        self._group = (group.expand_as(factor.power) if factor.order is None else group[factor.order]).int()
        if self._as_they_come:
            self._scale = weight.new_empty(*weight.shape[:-1], quantize.grid.groups(columns))
            self._zero_point = torch.empty_like(self._scale)
        else:
            self._scale, self._zero_point = quantize.known or self._find(weight, 0, columns)

    def of_block(self, now: Tensor, start: int, end: int) -> BlockGrid:
        if self._as_they_come:
            groups = slice(start // self._width, end // self._width)
            self._scale[..., groups], self._zero_point[..., groups] = self._find(now, start, end)
        grid = self._quantize.grid
        columns = self._group[..., start:end]
        return BlockGrid(self._scale, self._zero_point, columns, -grid.top, grid.top - 1, grid.is_fp4)

    def encode(self, settled: Tensor, loss: Tensor) -> Solved:
        grid = self._quantize.grid
        codes = nearest_codes(settled, self._scale, self._zero_point, grid)
        return Solved(
            weight=settled,
            loss=loss,
            codes=codes if grid.kind == "float" else codes.to(torch.int8),
            scale=self._scale.to(self._quantize.stored),
            zero_point=None if grid.symmetric else self._zero_point.to(torch.int8),
        )

    def _find(self, weight: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        if self._quantize.ranges == "half-quadratic":
            return half_quadratic(weight, self._quantize.grid, self._quantize.stored)
        importance = self._power[..., start:end] if self._quantize.ranges == "least-error" else None
        return find_ranges(weight, self._quantize.grid, self._quantize.stored, importance=importance)


def _inverse_blocks(upper: Tensor, block: int) -> list[Tensor]:
    """The inverses of R's diagonal blocks [..., block, block]. All full blocks are inverted in one call."""
    columns = upper.shape[-1]
    whole = columns // block * block
    grid = upper[..., :whole, :whole].reshape(*upper.shape[:-2], whole // block, block, whole // block, block)
    blocks = grid.diagonal(dim1=-4, dim2=-2).movedim(-1, 0).contiguous()  # [blocks, ..., block, block]
    identity = torch.eye(block, dtype=upper.dtype, device=upper.device)
    inverses = list(torch.linalg.solve_triangular(blocks, identity.expand_as(blocks), upper=True))
    if whole < columns:
        ragged = upper[..., whole:, whole:]
        width = columns - whole
        inverses.append(torch.linalg.solve_triangular(ragged, identity[:width, :width].expand_as(ragged), upper=True))
    return inverses


def _block_mask(now: Tensor, cost: Tensor, prune: Prune | None, rows: int, group: Group) -> BlockMask | None:
    """The mask of a block of columns. rows: of the weight, in all processes."""
    if prune is None:
        return None
    if prune.pattern is not None:
        return BlockMask(pattern=prune.pattern)
    score = (now * cost[..., None, :]).square_()
    count = round(prune.sparsity * rows * score.shape[-1])
    if count == 0:
        return BlockMask(given_mask=torch.zeros_like(score, dtype=torch.bool))
    if score.dim() == 3:
        least = score.flatten(1).sort(1).values[:, count - 1, None, None]
        return BlockMask(given_mask=score <= least)
    return BlockMask(given_mask=score <= _smallest(score.flatten(), count, group))


def _smallest(values: Tensor, count: int, group: Group) -> Tensor | float:
    """The `count`-th smallest of non-negative numbers of all processes."""
    if group.size == 1 and not (values.is_cuda and values.dtype == torch.float32):
        return values.kthvalue(count).values
    # On CUDA, `kthvalue` would run on a single block of threads. Non-negative floats sort as their bit patterns do: two histograms do it.
    # They can be summed over processes, too.
    keys = values.view(torch.int32)
    counts = count_upper(keys)
    group.sum(counts)
    upper, rank = locate(counts, count - 1)
    counts = count_lower(keys, upper)
    group.sum(counts)
    lower, _ = locate(counts, rank)
    return torch.tensor(upper << 16 | lower, dtype=torch.int32).view(torch.float32).item()


def _failure(message: str) -> NightpressError:
    return NightpressError(
        ErrorCode.NUMERICAL_FAILURE,
        message,
        hint="Check that the source model is whole; more calibration text or a larger `damping` helps a layer that saw too little.",
    )


def output_loss(weight: Tensor, rounded: Tensor, factor: Factor) -> Tensor:
    """(w − q)H(w − q)ᵀ [..., out]: the squared error of each output, summed over the tokens. H includes the factor's damping."""
    return (factor.ordered(weight - rounded) @ factor.upper).square_().sum(-1)
