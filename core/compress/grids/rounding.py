"""Round a weight to the nearest codes of a grid, and dequantize codes."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nightpress.core.compress.grids.grid import E2M1, LARGEST_FLOAT, Grid, bits_of, round_up, widen
from nightpress.core.compress.grids.workspace import Workspace
from nightpress.core.errors import ErrorCode, NightpressError

#: Adding this to a float32 with magnitude below 2^22 leaves no bits for a fraction: the sum is rounded to the nearest integer (ties to
#: even), and the low byte of its bit pattern is that integer. An addition and a narrowing copy replace rounding and conversion.
_ROUNDS = 1.5 * 2.0**23


@dataclass(frozen=True)
class Rounded:
    """A weight on a grid. The tensors may be views of a workspace: its next use overwrites them."""

    codes: Tensor  #: int8 [out, in]
    scale: Tensor  #: [out, groups], in the weight's dtype
    zero_point: Tensor | None  #: int8 [out, groups]; None if symmetric
    squared_error: float  #: Σ (w − ŵ)² over the measured rows, in float32
    squared_norm: float  #: Σ w² over the same rows


def magnitude_bits(weight: Tensor, workspace: Workspace) -> Tensor:
    """The bit patterns of |weight|, as integers of the same width. They sort as the magnitudes do, and compare several times faster."""
    integers = weight.view(bits_of(weight.dtype))
    out = workspace.take("magnitude", tuple(weight.shape), integers.dtype)
    return torch.bitwise_and(integers, torch.iinfo(integers.dtype).max, out=out)


def round_to_grid(weight: Tensor, grid: Grid, workspace: Workspace | None = None, *, measure_every: int = 1) -> Rounded:
    """Round a float weight [out, in] to the nearest codes.

    The error is measured on every `measure_every`-th row, starting with the first. Raises NightpressError(numerical_failure) on NaN or
    infinity.
    """
    workspace = workspace or Workspace()
    rows, columns = weight.shape
    groups = grid.groups(columns)
    grouped = weight.reshape(rows * groups, -1)  # [G, g]
    steps = workspace.take("steps", tuple(grouped.shape), torch.float32).copy_(grouped)
    scale, zero_point = (
        (_symmetric_scale(grouped, grid, workspace), None)
        if grid.symmetric
        else _asymmetric_range(steps, grid, weight.dtype)
    )  # [G]
    step = scale.float()
    if not math.isfinite(float(step.sum())):
        raise NightpressError(
            ErrorCode.NUMERICAL_FAILURE,
            "A weight holds NaN or infinity.",
            hint="The source model is damaged: export it again.",
        )
    steps *= step.reciprocal().unsqueeze(1)  # the weight in units of its step
    if zero_point is not None:
        steps.add_(zero_point.unsqueeze(1))
    steps.clamp_(-grid.top, grid.top - 1)
    codes = workspace.take("codes", (rows, columns), torch.int8)
    codes.view(grouped.shape).copy_(steps.add_(_ROUNDS).view(torch.int32))
    zeros = None if zero_point is None else zero_point.to(torch.int8).view(rows, groups)
    rounded = Rounded(codes, scale.view(rows, groups), zeros, 0.0, 0.0)
    return _measure(weight, rounded, measure_every, workspace)


def _measure(weight: Tensor, rounded: Rounded, every: int, workspace: Workspace) -> Rounded:
    """Compare every n-th row with its dequantized codes, and return `rounded` with both sums."""
    codes, scale = rounded.codes[::every], rounded.scale[::every].float()
    rows, groups = scale.shape
    source = workspace.take("measured", tuple(codes.shape), torch.float32).copy_(weight[::every]).view(-1)
    meant = workspace.take("meant", tuple(codes.shape), torch.float32).copy_(codes)
    grouped = meant.view(rows, groups, -1)
    if rounded.zero_point is not None:
        grouped -= rounded.zero_point[::every].unsqueeze(2)
    grouped *= scale.unsqueeze(2)
    error = meant.view(-1).sub_(source)
    return replace(rounded, squared_error=float(error.dot(error)), squared_norm=float(source.dot(source)))


def nearest_codes(weight: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """The codes nearest to a weight [..., rows, columns], in the weight's dtype. scale and zero_point [..., rows, groups]."""
    steps = weight.reshape(*scale.shape, -1) / scale[..., None]
    if grid.kind == "float":
        return nearest_floats(steps, grid.bits).reshape(weight.shape)
    return steps.round_().add_(zero_point[..., None]).clamp_(-grid.top, grid.top - 1).reshape(weight.shape)


def nearest_floats(values: Tensor, bits: int) -> Tensor:
    """Round values to the nearest numbers of e4m3 (8 bits) or e2m1 (4 bits), in their dtype. Larger values become the largest number."""
    if bits == 8:
        return values.clamp(-LARGEST_FLOAT[8], LARGEST_FLOAT[8]).to(torch.float8_e4m3fn).to(values.dtype)
    numbers = torch.tensor(E2M1, dtype=values.dtype, device=values.device)
    between = (numbers[1:] + numbers[:-1]) / 2
    return numbers[torch.bucketize(values.abs(), between)].copysign(values)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """Return ŵ [..., out, in] in float32, or in float64 for float64 scales. scale and zero_point [..., out, groups]."""
    wide = scale.double() if scale.dtype == torch.float64 else scale.float()
    grouped = codes.reshape(*scale.shape, -1).to(wide.dtype)  # [..., out, groups, g]
    if zero_point is not None:
        grouped = grouped - zero_point[..., None].to(wide.dtype)
    return (grouped * wide[..., None]).reshape(codes.shape)


def _symmetric_scale(grouped: Tensor, grid: Grid, workspace: Workspace) -> Tensor:
    # Integers compare faster than floats. The bit patterns of floats sort as the floats do, but those of negative floats in reverse order.
    bits = grouped.view(bits_of(grouped.dtype))
    flipped = workspace.take("flipped", tuple(bits.shape), bits.dtype)
    torch.bitwise_xor(bits, torch.iinfo(bits.dtype).max, out=flipped)  # puts the negative floats in order
    highest = bits.amax(dim=1).clamp_(min=0).view(grouped.dtype)
    lowest = flipped.amin(dim=1).clamp_(max=-1).bitwise_xor_(torch.iinfo(bits.dtype).max).view(grouped.dtype)
    return grid.signed_step(widen(lowest), widen(highest), grouped.dtype)


def _asymmetric_range(grouped: Tensor, grid: Grid, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    low, high = grouped.amin(dim=1).clamp_(max=0), grouped.amax(dim=1).clamp_(min=0)  # zero is always on the grid
    scale = round_up((high - low) / (2 * grid.top - 1), dtype)
    return scale, torch.round(-grid.top - low / scale.float()).clamp_(-grid.top, grid.top - 1)
