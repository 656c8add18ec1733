"""One Optimal-Brain-Surgeon solver for quantization (GPTQ), pruning (SparseGPT) and both at once.

A row w of a weight becomes q so that ‖(w − q)X‖² = (w − q)H(w − q)ᵀ is small, H = Σ xxᵀ over calibration tokens. With H = RRᵀ, R upper
triangular, that is ‖(w − q)R‖², and column j of (w − q)R depends on the columns up to j alone. So the columns are settled from left to
right, each after it has made up for what those before it lost. This is the published algorithm with one triangular factor of H itself in
place of the factor of its inverse, since [inverse of H from column j on]_jj = 1/R_jj²: a third of the arithmetic, and nothing is inverted.

For a weight [m, n]: n³/3 multiply-adds for the factor, once for all weights with the same inputs, and m·n²/2 for passing losses on;
these travel in blocks of 128 and 1024 columns, so that nearly all of it is matrix products.

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
from nightpress.core.compress.solvers.gram import damped_cholesky
from nightpress.core.compress.solvers.threshold import count_lower, count_upper, locate
from nightpress.core.errors import ErrorCode, NightpressError

_BLOCK = 128  #: columns that a kernel settles in one go
_OUTER = 1024  #: columns whose losses are passed on to the rest together


@dataclass(frozen=True)
class Quantize:
    """Settle weights on an integer grid.

    A group no wider than a block takes its range when its turn comes, from weights that already made up for others. A wider one, and
    every one when columns are settled out of order, takes it from the weight as it was.
    """

    grid: Grid
    stored: torch.dtype  #: of the scales
    ranges: str = "extremes"  #: or `least-error`, weighted by the inputs' power, or `half-quadratic`
    #: Scales and zero points [out, groups] of the weight as it was, where they are known already.
    known: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Prune:
    """Settle a share of the weights at zero: in every block of columns those that cost least, or by a pattern N:M in each row."""

    sparsity: float
    pattern: tuple[int, int] | None = None  #: (kept, of)


@dataclass(frozen=True)
class Factor:
    """What the solver needs of a Gram matrix; the same for every weight that sees the same inputs."""

    upper: Tensor  #: [in, in], R of H + damping = RRᵀ, in the order in which columns are settled
    power: Tensor  #: [in], the diagonal of H, in the columns' own order
    damping: float  #: what was added to H's diagonal
    order: Tensor | None  #: [in], which column is settled first, second, …; None: as they stand


@dataclass(frozen=True)
class Solved:
    """A settled weight. Codes, scales and zero points only where there was a grid."""

    weight: Tensor  #: [out, in], on the grid and under the mask
    loss: Tensor  #: [out], (w − q)H(w − q)ᵀ, H damped
    codes: Tensor | None = None  #: int8 [out, in]
    scale: Tensor | None = None  #: [out, groups], in the stored dtype
    zero_point: Tensor | None = None  #: int8 [out, groups]; None if the grid is symmetric


def factorize(gram: Tensor, *, damping: float = 0.01, by_power: bool = False) -> Factor:
    """Factor a Gram matrix [in, in], float32 or float64, with `damping` times its mean diagonal added. `gram` stays as it is.

    by_power: settle the columns with the strongest inputs first, while most others can still make up for them ("activation order").
    Raises NightpressError(numerical_failure) if it holds NaN or infinity, or stays indefinite with a thousandfold damping.
    """
    power = gram.diagonal().clone()
    mean = float(power.mean())
    if not math.isfinite(mean):
        raise _failure("The inputs of a layer hold NaN or infinity during calibration.")
    order = torch.argsort(power, descending=True, stable=True) if by_power else None
    # R is the lower factor of H turned by 180°, turned back.
    turned = gram.flip(0, 1) if order is None else gram[order.flip(0)][:, order.flip(0)]
    # Where no token ever came, any positive number leaves every column to itself.
    lower, added = damped_cholesky(turned, damping * mean or 1.0)
    return Factor(upper=lower.flip(0, 1), power=power, damping=added, order=order)


def solve(weight: Tensor, factor: Factor, quantize: Quantize | None = None, prune: Prune | None = None) -> Solved:
    """Settle weight [out, in], of the factor's dtype and device, column by column. `weight` stays as it is.

    Weights that see the same inputs may be stacked: rows don't depend on each other, only unstructured pruning shares its quota among
    them. Raises ValueError for a pattern N:M out of its columns' order.
    """
    if factor.order is not None and prune is not None and prune.pattern is not None:
        raise ValueError("a pattern N:M needs its columns in their own order")
    rows, columns = weight.shape
    settled = weight.clone() if factor.order is None else weight[:, factor.order]
    ranges = None if quantize is None else _Ranges(weight, factor, quantize)
    block = _BLOCK if ranges is None else ranges.block
    if prune is not None and prune.pattern is not None:
        block = math.lcm(block, prune.pattern[1])  # a pattern's neighbours are decided together
    outer_width = max(_OUTER // block, 1) * block
    cost = factor.upper.diagonal().contiguous()
    inverses = _inverse_blocks(factor.upper, block)
    loss = settled.new_zeros(rows)
    owed = torch.zeros_like(settled)  # (w − q)R over the settled columns: what the others have to make up for
    for outer in range(0, columns, outer_width):
        outer_end = min(outer + outer_width, columns)
        lost = settled.new_empty(rows, outer_end - outer)
        for start in range(outer, outer_end, block):
            end = min(start + block, outer_end)
            here, later = slice(start, end), slice(end, outer_end)
            inverse = inverses[start // block]
            now = torch.addmm(settled[:, here], owed[:, here], inverse)
            grid = None if ranges is None else ranges.of_block(now, start, end)
            spread = (inverse * cost[here, None]).contiguous()
            obs_block(now, spread, cost[here], loss, grid, _block_mask(now, cost[here], prune))
            lost_here = torch.sub(settled[:, here], now, out=lost[:, start - outer : end - outer])
            settled[:, here] = now
            owed[:, later].addmm_(lost_here, factor.upper[here, later])
        owed[:, outer_end:].addmm_(lost, factor.upper[outer:outer_end, outer_end:])
    del owed
    if factor.order is not None:
        settled = torch.empty_like(settled).index_copy_(1, factor.order, settled)
    if not bool(torch.isfinite(loss).all()):
        raise _failure("A weight left the finite numbers while it was settled.")
    return Solved(weight=settled, loss=loss) if ranges is None else ranges.encode(settled, loss)


class _Ranges:
    """The scales and zero points of one weight, as they become known."""

    def __init__(self, weight: Tensor, factor: Factor, quantize: Quantize) -> None:
        self._quantize, self._power = quantize, factor.power
        rows, columns = weight.shape
        self._width = quantize.grid.group_size or columns
        self._as_they_come = factor.order is None and self._width <= _BLOCK
        self.block = self._width if self._as_they_come else _BLOCK
        group = torch.arange(columns, device=weight.device) // self._width
        self._group = (group if factor.order is None else group[factor.order]).int()
        if self._as_they_come:
            self._scale = weight.new_empty(rows, quantize.grid.groups(columns))
            self._zero_point = torch.empty_like(self._scale)
        else:
            self._scale, self._zero_point = quantize.known or self._find(weight, 0, columns)

    def of_block(self, now: Tensor, start: int, end: int) -> BlockGrid:
        if self._as_they_come:
            groups = slice(start // self._width, end // self._width)
            self._scale[:, groups], self._zero_point[:, groups] = self._find(now, start, end)
        top = self._quantize.grid.top
        return BlockGrid(self._scale, self._zero_point, self._group[start:end], -top, top - 1)

    def encode(self, settled: Tensor, loss: Tensor) -> Solved:
        grid = self._quantize.grid
        return Solved(
            weight=settled,
            loss=loss,
            codes=nearest_codes(settled, self._scale, self._zero_point, grid).to(torch.int8),
            scale=self._scale.to(self._quantize.stored),
            zero_point=None if grid.symmetric else self._zero_point.to(torch.int8),
        )

    def _find(self, weight: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        if self._quantize.ranges == "half-quadratic":
            return half_quadratic(weight, self._quantize.grid, self._quantize.stored)
        importance = self._power[start:end] if self._quantize.ranges == "least-error" else None
        return find_ranges(weight, self._quantize.grid, self._quantize.stored, importance=importance)


def _inverse_blocks(upper: Tensor, block: int) -> list[Tensor]:
    """The inverses of the blocks on the diagonal, all whole ones found together."""
    columns = len(upper)
    whole = columns // block * block
    grid = upper[:whole, :whole].reshape(whole // block, block, whole // block, block)
    blocks = grid.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()  # [blocks, block, block]
    identity = torch.eye(block, dtype=upper.dtype, device=upper.device)
    inverses = list(torch.linalg.solve_triangular(blocks, identity.expand_as(blocks), upper=True))
    if whole < columns:
        ragged = upper[whole:, whole:]
        inverses.append(torch.linalg.solve_triangular(ragged, identity[: len(ragged), : len(ragged)], upper=True))
    return inverses


def _block_mask(now: Tensor, cost: Tensor, prune: Prune | None) -> BlockMask | None:
    if prune is None:
        return None
    if prune.pattern is not None:
        return BlockMask(pattern=prune.pattern)
    score = (now * cost).square_()
    count = round(prune.sparsity * score.numel())
    if count == 0:
        return BlockMask(told=torch.zeros_like(score, dtype=torch.bool))
    return BlockMask(told=score <= _smallest(score.flatten(), count))


def _smallest(values: Tensor, count: int) -> Tensor | float:
    """The `count`-th smallest of non-negative numbers."""
    if not values.is_cuda or values.dtype != torch.float32:
        return values.kthvalue(count).values
    # On CUDA one block of threads would look for it. Bit patterns of such numbers sort as they do, so two histograms find it.
    keys = values.view(torch.int32)
    upper, rank = locate(count_upper(keys), count - 1)
    lower, _ = locate(count_lower(keys, upper), rank)
    return torch.tensor(upper << 16 | lower, dtype=torch.int32).view(torch.float32).item()


def _failure(message: str) -> NightpressError:
    return NightpressError(
        ErrorCode.NUMERICAL_FAILURE,
        message,
        hint="Check that the source model is whole; more calibration text or a larger `damping` helps a layer that saw too little.",
    )


def output_loss(weight: Tensor, rounded: Tensor, factor: Factor) -> Tensor:
    """(w − q)H(w − q)ᵀ [out] for each row, H damped as in the factor: what the rounding costs the outputs, summed over the tokens."""
    lost = weight - rounded
    if factor.order is not None:
        lost = lost[:, factor.order]
    return (lost @ factor.upper).square_().sum(1)
