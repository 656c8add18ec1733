"""Scales and zero points for a grid, in float32 on any device: from the extremes, or with the least rounding error.

The least error is found by shrinking a group's range in steps: clipping a few large weights makes the steps finer for all other weights.
For fp4, larger ranges are tried, too.
The squared error of a weight is weighted by the power of its input (the diagonal of the Gram matrix).
"""

import torch
from torch import Tensor

from nightpress.core.compress.grids.grid import SMALLEST_SCALE, Grid, round_up
from nightpress.core.compress.grids.rounding import nearest_floats

#: Weights searched together on a CPU: few enough to stay in its caches through all tries, enough to outweigh the cost of the calls.
_CHUNK = 512 * 1024
SHRINKS = tuple(1.0 - 0.02 * step for step in range(26))  #: factors of the range, tried in turn: 1.00 … 0.50
#: Factors for e2m1. Its largest numbers, 4 and 6, are far apart: a group may lose least with its largest weight at 4 (arXiv 2512.02010).
FP4_FACTORS = (1.0, *(1.0 + 0.05 * step for step in range(1, 12)), *(1.0 - 0.05 * step for step in range(1, 11)))


def find_ranges(
    weight: Tensor,
    grid: Grid,
    stored: torch.dtype,
    *,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return scales and zero points, each [..., rows, groups] in the dtype of weight [..., rows, columns]. `stored` can hold the scales.

    With importance [..., columns], the range has the least squared error, weighted by importance. Without it, the range is that of the
    extremes. Zero is always on the grid.
    """
    if importance is not None and weight.is_cuda and weight.dtype == torch.float32 and grid.kind == "int":
        from nightpress.core.compress.grids.ranges_triton import launch

        return launch(weight, grid, stored, importance, SHRINKS)
    if weight.dim() == 2:
        return search(weight, grid, stored, importance)
    if importance is None:
        scale, zero_point = search(weight.flatten(0, 1), grid, stored, None)
        return scale.view(*weight.shape[:2], -1), zero_point.view(*weight.shape[:2], -1)
    found = [search(matrix, grid, stored, weigh) for matrix, weigh in zip(weight, importance, strict=True)]
    return torch.stack([scale for scale, _ in found]), torch.stack([zero_point for _, zero_point in found])


def search(weight: Tensor, grid: Grid, stored: torch.dtype, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """`find_ranges` in torch, on any device. On CUDA in float32, a Triton kernel does this and reads the weight only once."""
    chunk = max(1, _CHUNK // weight.shape[1])
    if len(weight) > chunk and not weight.is_cuda:
        found = [search(rows, grid, stored, importance) for rows in torch.split(weight, chunk)]
        return torch.cat([scale for scale, _ in found]), torch.cat([zero_point for _, zero_point in found])
    rows, columns = weight.shape
    groups = grid.groups(columns)
    grouped = weight.reshape(rows, groups, -1)  # [rows, groups, g]
    low, high = grouped.amin(2).clamp_(max=0), grouped.amax(2).clamp_(min=0)
    scale, zero_point = _grid_over(low, high, grid, stored)
    if importance is None:
        return scale, zero_point
    weigh = importance.to(weight.dtype).reshape(1, groups, -1)
    room = torch.empty_like(grouped), torch.empty_like(grouped)
    least = _squared_error(grouped, scale, zero_point, grid, weigh, room)
    for factor in (FP4_FACTORS if grid.is_fp4 else SHRINKS)[1:]:
        other_scale, other_zero = _grid_over(low * factor, high * factor, grid, stored)
        error = _squared_error(grouped, other_scale, other_zero, grid, weigh, room)
        better = error < least
        least = torch.where(better, error, least)
        scale = torch.where(better, other_scale, scale)
        zero_point = torch.where(better, other_zero, zero_point)
    return scale, zero_point


def _grid_over(low: Tensor, high: Tensor, grid: Grid, stored: torch.dtype) -> tuple[Tensor, Tensor]:
    if grid.symmetric:
        scale = grid.signed_step(low, high, stored).to(low.dtype)
        return scale, torch.zeros_like(scale)
    scale = round_up((high - low) / (2 * grid.top - 1), stored).to(low.dtype)
    return scale, torch.round(-grid.top - low / scale).clamp_(-grid.top, grid.top - 1)


def _squared_error(
    grouped: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, weigh: Tensor, room: tuple[Tensor, Tensor]
) -> Tensor:
    """The weighted squared error of each group, [rows, groups].

    room: two buffers [rows, groups, g] for intermediate results. Allocating new ones would cost more than the arithmetic.
    """
    steps, nearest = room
    torch.div(grouped, scale[..., None], out=steps)
    if grid.kind == "float":
        error = steps.sub_(nearest_floats(steps, grid.bits))
    else:
        torch.round(steps, out=nearest)
        if grid.symmetric:
            nearest.clamp_(-grid.top, grid.top - 1)
        else:
            nearest.clamp_((-grid.top - zero_point)[..., None], (grid.top - 1 - zero_point)[..., None])
        error = steps.sub_(nearest)
    return error.square_().mul_(weigh).sum(2) * scale.square()


def half_quadratic(
    weight: Tensor, grid: Grid, stored: torch.dtype, *, norm: float = 0.7, rounds: int = 20
) -> tuple[Tensor, Tensor]:
    """`find_ranges` with the least Σ |w − ŵ|^norm, without data. A few large errors are accepted so that all other errors are smaller.

    Half-quadratic splitting alternates two steps. The first sets an auxiliary error: the true error after shrinkage in that norm. The
    second fits scale and zero point by least squares. Badri and Shaji, Half-Quadratic Quantization (2023),
    https://mobiusml.github.io/hqq_blog/, eq. 5–6. There the zero point is a float. Here it is an integer, and the scale is fitted too.
    """
    if weight.dim() == 3:
        scale, zero_point = half_quadratic(weight.flatten(0, 1), grid, stored, norm=norm, rounds=rounds)
        return scale.view(*weight.shape[:2], -1), zero_point.view(*weight.shape[:2], -1)
    chunk = max(1, _CHUNK // weight.shape[1])
    if len(weight) > chunk and not weight.is_cuda:
        found = [half_quadratic(rows, grid, stored, norm=norm, rounds=rounds) for rows in torch.split(weight, chunk)]
        return torch.cat([scale for scale, _ in found]), torch.cat([zero_point for _, zero_point in found])
    grouped = weight.reshape(len(weight), grid.groups(weight.shape[1]), -1)  # [rows, groups, g]
    low, high = grouped.amin(2).clamp_(max=0), grouped.amax(2).clamp_(min=0)
    scale, zero_point = _grid_over(low, high, grid, stored)
    best, least = (scale, zero_point), torch.full_like(scale, torch.inf)
    beta = 10.0
    for _ in range(rounds):
        codes = (grouped / scale[..., None]).round_().add_(zero_point[..., None]).clamp_(-grid.top, grid.top - 1)
        error = grouped / scale[..., None] - (codes - zero_point[..., None])  # in steps
        loss = error.abs().pow_(norm).sum(2) * scale.abs() ** norm
        better = loss < least
        least = torch.where(better, loss, least)
        best = torch.where(better, scale, best[0]), torch.where(better, zero_point, best[1])
        size = error.abs()
        borne = (size - size.clamp(min=1e-6).pow(norm - 1) / beta).clamp_(min=0).copysign_(error)
        meant = grouped - borne * scale[..., None]
        scale, zero_point = _fit(codes, meant, scale, zero_point, grid, stored)
        beta *= 1.01
    return best


def _fit(
    codes: Tensor, meant: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, stored: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Fit scales and zero points [rows, groups] by least squares, so that codes dequantize nearest to `meant`; both [rows, groups, g]."""
    if grid.symmetric:
        square = codes.square().sum(2)
        fitted = (codes * meant).sum(2) / square.clamp(min=1)
    else:
        centred = codes - codes.mean(2, keepdim=True)
        fitted = (centred * meant).sum(2) / centred.square().sum(2).clamp(min=1e-6)
    fitted = torch.where(fitted * scale.sign() > SMALLEST_SCALE, fitted, scale)
    if not grid.symmetric:
        zero_point = torch.round((codes - meant / fitted[..., None]).mean(2)).clamp_(-grid.top, grid.top - 1)
        steps = codes - zero_point[..., None]
        again = (steps * meant).sum(2) / steps.square().sum(2).clamp(min=1)
        fitted = torch.where(again > SMALLEST_SCALE, again, fitted)
    return fitted.to(stored).to(scale.dtype), zero_point
