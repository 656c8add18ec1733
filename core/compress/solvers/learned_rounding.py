"""Learn the rounding of a weight by signed gradient descent.

A weight w with the scale s and the zero point z gets the code q = clamp(⌊w/s + v⌉ + z). Its offset v, from −½ to ½, and factors of its
group's range are learned. They move by the sign of their gradient times a rate that falls linearly to zero. Gradients pass through the
rounding as if it were the identity. The scales of fp4 weights don't move.

No graph of gradients is kept for this: given the gradient g of ŵ = s·(q − z), with i = 1 where q is not clamped and 0 elsewhere,
∂/∂v = g·s·i, ∂/∂s = Σ g·(q − z) − Σ g·i·w / s and ∂/∂z = −s·Σ g·(1 − i), summed over the group. On a GPU, the kernels of
`learned_rounding_triton` do the same in one reading.

Cheng et al., SignRound (arXiv 2309.05516), eq. 3–6.
"""

import torch
from torch import Tensor

from nightpress.core.compress.grids.grid import E2M1, SMALLEST_SCALE, Grid
from nightpress.core.compress.grids.rounding import dequantize, nearest_floats
from nightpress.core.compress.grids.stored import Coded, grid_of
from nightpress.core.recipes.schemes import Scheme

#: A weight whose first code is not the nearest starts this far from the code, in steps: just before it would be rounded to its neighbour.
_EDGE = 0.45
_LEAST, _MOST = 0.5, 1.5  #: limits of the factors of a range


class LearnedWeight:
    """A weight [out, in] whose rounding is learned. It starts as the given codes."""

    def __init__(self, weight: Tensor, start: Coded, scheme: Scheme) -> None:
        """weight: float32. start: the first codes, with a scale for each row or group."""
        self._grid, self._start = grid_of(scheme), start
        self._scale = start.scale.float() / (1.0 if start.global_scale is None else start.global_scale)  # [out, groups]
        self._shape = weight.shape
        if start.zero_point is None:
            self._zero_point = None
            self.factors = torch.ones_like(self._scale)[None]  # [1, out, groups]: of the scale
        else:
            self._zero_point = start.zero_point.float()
            self.factors = torch.ones_like(self._scale).repeat(2, 1, 1)  # [2, out, groups]: of the lowest and highest
        self._weight = self._with_the_codes(weight)  # [out, groups, width]
        self.offset = torch.zeros_like(self._weight)

    def weight(self) -> Tensor:
        """The rounded weight ŵ [out, in] in float32, exactly as a loader dequantizes `coded`."""
        return rounded(self._weight, self.offset, *self._range(), self._grid).view(self._shape)

    def coded(self) -> Coded:
        """The present codes, scales and zero points, in the form of the start."""
        scale, zero_point = self._range()
        codes, _ = _round(self._weight, self.offset, scale, zero_point, self._grid)
        return Coded(
            codes.to(self._start.codes.dtype).view(self._shape),
            self._stored(),
            None if zero_point is None else zero_point.to(torch.int8),
            self._start.global_scale,
        )

    def step(self, gradient: Tensor, rate: float) -> None:
        """Move against a gradient [out, in] of the loss in the present `weight()`, of any float dtype."""
        scale, zero_point = self._range()
        given = gradient.reshape(self._weight.shape), self._weight, self.offset, scale, zero_point
        by_codes, by_weights, total, inside = descend(*given, self._grid, rate)
        slope = by_codes - by_weights / scale  # ∂/∂s [out, groups], but for z
        if zero_point is None:
            self._move(0, slope * scale, rate)
        else:
            slope -= total * zero_point
            shift = (inside - total) * scale  # ∂/∂z
            # s = (high − low) / (n − 1) and z = −top − low / s, for n codes
            low, high = self._ends()
            by_scale = slope + shift * low / scale.square()
            width = 2 * self._grid.top - 1
            self._move(0, (-by_scale / width - shift / scale) * low, rate)
            self._move(1, by_scale / width * high, rate)

    def _move(self, number: int, slope: Tensor, rate: float) -> None:
        if self._grid.is_fp4:
            return  # fp8 scales and powers of two change by leaps, and the codes can't follow them: see decision 0162
        self.factors[number].sub_(slope.sign(), alpha=rate).clamp_(_LEAST, _MOST)

    def _with_the_codes(self, weight: Tensor) -> Tensor:
        """The weight in groups, moved to where the start's codes are the nearest ones: rounded without offsets, it gives these codes."""
        grouped = weight.view(*self._scale.shape, -1)
        if self._grid.kind == "float":
            return self._with_the_floats(grouped)
        codes = self._start.codes.view(grouped.shape)
        centre = codes.float() if self._zero_point is None else codes - self._zero_point[..., None]
        away = (grouped / self._scale[..., None]).sub_(centre)
        beyond = (codes == self._grid.top - 1) & (away > 0) | (codes == -self._grid.top) & (away < 0)
        near = away.clamp(-_EDGE, _EDGE).add_(centre).mul_(self._scale[..., None])
        return torch.where((away.abs() < 0.5) | beyond, grouped, near)

    def _with_the_floats(self, grouped: Tensor) -> Tensor:
        """As `_with_the_codes`, for a weight [out, groups, width] and codes of e2m1."""
        codes = self._start.codes.view(grouped.shape)
        steps = grouped / self._scale[..., None]
        numbers = torch.tensor(E2M1, device=codes.device)
        places = torch.bucketize(codes.abs(), numbers)
        gaps = numbers.diff()
        outwards = torch.cat([gaps, gaps.new_full((1,), torch.inf)])[places]  # beyond the largest, it stays the nearest
        inwards = torch.cat([gaps[:1], gaps])[places]
        away = (steps - codes) * torch.where(codes < 0, -1.0, 1.0)  # > 0: to larger magnitudes
        near = codes + away.clamp(-_EDGE * inwards, _EDGE * outwards) * torch.where(codes < 0, -1.0, 1.0)
        return torch.where(nearest_floats(steps, 4) == codes, grouped, near * self._scale[..., None])

    def _ends(self) -> tuple[Tensor, Tensor]:
        """The lowest and highest number of each group's grid at the start, [out, groups]."""
        assert self._zero_point is not None
        top = self._grid.top
        return self._scale * (-top - self._zero_point), self._scale * (top - 1 - self._zero_point)

    def _wanted_scale(self) -> Tensor:
        if self._zero_point is None:
            return self._scale * self.factors[0]
        low, high = self._ends()
        return ((high * self.factors[1] - low * self.factors[0]) / (2 * self._grid.top - 1)).clamp_(min=SMALLEST_SCALE)

    def _stored(self) -> Tensor:
        """The scales in the dtype in which they are stored. A scale that would become zero stays as it was."""
        total = 1.0 if self._start.global_scale is None else self._start.global_scale
        held = (self._wanted_scale() * total).to(self._start.scale.dtype)
        return torch.where(held.float() != 0, held, self._start.scale)

    def _range(self) -> tuple[Tensor, Tensor | None]:
        """The present scales and zero points in float32, [out, groups]."""
        scale = self._stored().float()
        if self._start.global_scale is not None:
            scale = scale / self._start.global_scale
        if self._zero_point is None:
            return scale, None
        top = self._grid.top
        low, _ = self._ends()
        return scale, torch.round(-top - low * self.factors[0] / scale).clamp_(-top, top - 1)


def rounded(weight: Tensor, offset: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """Return ŵ. weight, offset and result are float32 [out, groups, width]; scale and zero_point float32 [out, groups]."""
    if _has_kernel(weight, grid):
        from nightpress.core.compress.solvers import learned_rounding_triton  # triton is installed only with CUDA

        return learned_rounding_triton.rounded(weight, offset, scale, zero_point, grid)
    codes, _ = _round(weight, offset, scale, zero_point, grid)
    return dequantize(codes, scale, zero_point)


def descend(
    gradient: Tensor, weight: Tensor, offset: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid, rate: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Move the offsets against a gradient [out, groups, width] of ŵ, of any float dtype. The other tensors are those of `rounded`.

    Returns the sums over each group of g·q, g·i·w, g and g·i, float32 [out, groups]. The last two are for zero points.
    """
    if _has_kernel(weight, grid):
        from nightpress.core.compress.solvers import learned_rounding_triton

        return learned_rounding_triton.descend(gradient, weight, offset, scale, zero_point, grid, rate)
    codes, free = _round(weight, offset, scale, zero_point, grid)
    gradient = gradient.float()
    inside = gradient * free
    sums = (gradient * codes).sum(2), (inside * weight).sum(2), gradient.sum(2), inside.sum(2)
    inside *= scale[..., None]  # which may be negative
    offset.sub_(inside.sign_(), alpha=rate).clamp_(-0.5, 0.5)
    return sums


def _has_kernel(weight: Tensor, grid: Grid) -> bool:
    return weight.is_cuda and (grid.kind == "int" or grid.is_fp4)


def _round(
    weight: Tensor, offset: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid
) -> tuple[Tensor, Tensor]:
    """Return the codes as floats, and whether each is not clamped; both [out, groups, width]."""
    steps = weight / scale[..., None]
    if grid.kind == "float":
        moved = _local_step(steps).mul_(offset).add_(steps)
        return nearest_floats(moved, grid.bits), moved.abs() <= grid.reach
    wanted = steps.add_(offset).round_()
    if zero_point is not None:
        wanted += zero_point[..., None]
    codes = wanted.clamp(-grid.top, grid.top - 1)
    return codes, codes == wanted


def _local_step(steps: Tensor) -> Tensor:
    """The distance between two numbers of e2m1 near a magnitude: ½ below 2, 1 below 4, else 2."""
    size = steps.abs()
    return torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
