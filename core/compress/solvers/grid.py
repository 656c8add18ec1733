"""Grids: scales and zero points from a weight's range, rounding to the nearest step, and packing into 32-bit words.

A grid of b bits has the codes −2^(b−1) … 2^(b−1)−1, and a code q stands for scale · (q − zero_point); a grid of floats has the numbers of
e4m3 (8 bits) or e2m1 (4 bits) for codes, and no zero points. Scales are rounded *up* to the
dtype they are stored in, so that nothing is clipped by more than its rounding: |w − ŵ| ≤ scale/2 for every finite weight.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from nightpress.core.errors import ErrorCode, NightpressError

_SAME_SIZE_INT = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
#: Added to a float32 of less than 2^22, it leaves no bits for a fraction: the sum is rounded to the nearest integer (of two, the even
#: one), and the low byte of its pattern is that integer. One addition and a narrowing copy do what round and convert would.
_ROUNDS = 1.5 * 2.0**23
#: The numbers of e2m1 from zero up; their places are its codes without a sign.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST_FLOAT = {8: 448.0, 4: 6.0}
_SMALLEST_SCALE = 2.0**-100  # its reciprocal is still finite in float32


@dataclass(frozen=True)
class Grid:
    """Which codes there are and which weights share a scale."""

    bits: int
    group_size: int | None = None  #: inputs that share a scale; None: a whole row
    symmetric: bool = True
    kind: Literal["int", "float"] = "int"

    @property
    def top(self) -> int:
        """Of integers one more than the largest code, e.g. 8 at 4 bits; also what is added to a code to make it unsigned."""
        return int(2 ** (self.bits - 1))

    @property
    def reach(self) -> float:
        """How many steps from zero the largest weight may lie on a symmetric grid and still be within half a step of a code."""
        return self.top - 0.5 if self.kind == "int" else LARGEST_FLOAT[self.bits]

    def step(self, low: Tensor, high: Tensor) -> Tensor:
        """The scale of a symmetric grid for weights from low ≤ 0 to high ≥ 0.

        Integers have one code more below zero than above it. So the lowest weight is the lowest code, without an error, and the highest
        lies half a step above the highest: of equal extremes the lowest would go half a step astray too, in coarser steps.
        """
        below = self.top if self.kind == "int" else self.reach
        return torch.maximum(-low / below, high / self.reach)

    def groups(self, columns: int) -> int:
        """Scales a row. The columns must be a multiple of the group size."""
        return 1 if self.group_size is None else columns // self.group_size


@dataclass(frozen=True)
class Rounded:
    """A weight on a grid. Tensors may be views of a workspace: they hold until it is used again."""

    codes: Tensor  #: int8 [out, in]
    scale: Tensor  #: [out, groups], in the weight's dtype
    zero_point: Tensor | None  #: int8 [out, groups]; None if symmetric
    squared_error: float  #: Σ (w − ŵ)² over the measured rows, in float32
    squared_norm: float  #: Σ w² over the same rows


@dataclass
class Workspace:
    """Buffers that one thread uses again for every chunk: allocating them anew costs more than the arithmetic."""

    _flat: dict[tuple[str, torch.dtype], Tensor] = field(default_factory=dict)
    _views: dict[tuple[str, torch.dtype, tuple[int, ...]], Tensor] = field(default_factory=dict)

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor; whatever was taken under this name before is overwritten."""
        view = self._views.get((name, dtype, shape))
        if view is None:
            count = math.prod(shape)
            flat = self._flat.get((name, dtype))
            if flat is None or flat.numel() < count:
                flat = self._flat[name, dtype] = torch.empty(count, dtype=dtype)
                self._views = {key: one for key, one in self._views.items() if key[:2] != (name, dtype)}
            view = self._views[name, dtype, shape] = flat[:count].view(shape)
        return view


def magnitude_bits(weight: Tensor, workspace: Workspace) -> Tensor:
    """The bit patterns of |weight| as integers of its width. They sort as the magnitudes do, and compare several times faster than floats."""
    integers = weight.view(_SAME_SIZE_INT[weight.dtype])
    out = workspace.take("magnitude", tuple(weight.shape), integers.dtype)
    return torch.bitwise_and(integers, torch.iinfo(integers.dtype).max, out=out)


def round_to_grid(weight: Tensor, grid: Grid, workspace: Workspace | None = None, *, measure_every: int = 1) -> Rounded:
    """Round a float weight [out, in] to the nearest codes, and measure the error of every n-th row, from the first.

    Raises NightpressError(numerical_failure) on NaN or infinity.
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
    """Compare every n-th row with what its codes stand for."""
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


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """ŵ [out, in] in float32 (float64 for float64 scales)."""
    wide = scale.double() if scale.dtype == torch.float64 else scale.float()
    grouped = codes.reshape(*scale.shape, -1).to(wide.dtype)  # [out, groups, g]
    if zero_point is not None:
        grouped = grouped - zero_point.unsqueeze(2).to(wide.dtype)
    return (grouped * wide.unsqueeze(2)).reshape(codes.shape)


def pack(codes: Tensor, bits: int, workspace: Workspace | None = None) -> Tensor:
    """Codes int8 [out, in] → int32 [out, ⌈in·bits/32⌉], the lowest bits first; what fills the last word up is zero.

    The layout of compressed-tensors' `pack-quantized`. On a little-endian machine it is the codes, made unsigned, in their order.
    """
    if bits not in (4, 8):
        raise ValueError(f"codes of {bits} bits are not packed here")
    workspace = workspace or Workspace()
    rows, columns = codes.shape
    per_word = 32 // bits
    padded = -(-columns // per_word) * per_word
    unsigned = workspace.take("unsigned", (rows, padded), torch.uint8)
    torch.add(codes.view(torch.uint8), 2 ** (bits - 1), out=unsigned[:, :columns])
    if padded > columns:
        unsigned[:, columns:] = 0
    if bits == 8:
        return unsigned.view(torch.int32)
    pairs = unsigned.view(torch.int16)  # the even column in the low byte, the odd one in the high byte
    merged = torch.bitwise_right_shift(pairs, 4, out=workspace.take("pairs", tuple(pairs.shape), torch.int16))
    merged |= pairs
    packed = workspace.take("packed", (rows, padded // 2), torch.uint8)
    return packed.copy_(merged).view(torch.int32)


def pack_zero_points(zero_point: Tensor, bits: int) -> Tensor:
    """Zero points int8 [out, groups] → int32 [⌈out·bits/32⌉, groups]: packed down the rows, as `pack-quantized` wants them."""
    return pack(zero_point.t().contiguous(), bits).t().contiguous()


def _symmetric_scale(grouped: Tensor, grid: Grid, workspace: Workspace) -> Tensor:
    bits = grouped.view(_SAME_SIZE_INT[grouped.dtype])  # as integers floats compare faster, those below zero in reverse
    flipped = workspace.take("flipped", tuple(bits.shape), bits.dtype)
    torch.bitwise_xor(bits, torch.iinfo(bits.dtype).max, out=flipped)  # … which puts them in order
    highest = bits.amax(dim=1).clamp_(min=0).view(grouped.dtype)
    lowest = flipped.amin(dim=1).clamp_(max=-1).bitwise_xor_(torch.iinfo(bits.dtype).max).view(grouped.dtype)
    return _round_up(grid.step(_widen(lowest), _widen(highest)), grouped.dtype)


def _asymmetric_range(grouped: Tensor, grid: Grid, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    low, high = grouped.amin(dim=1).clamp_(max=0), grouped.amax(dim=1).clamp_(min=0)  # zero is always on the grid
    scale = _round_up((high - low) / (2 * grid.top - 1), dtype)
    return scale, torch.round(-grid.top - low / scale.float()).clamp_(-grid.top, grid.top - 1)


def _widen(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _round_up(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest numbers of `dtype` that are no smaller than these positive ones."""
    scale = scale.clamp_(min=_SMALLEST_SCALE)
    stored = scale.to(dtype)
    stored.view(_SAME_SIZE_INT[dtype]).add_(_widen(stored) < scale)  # the next pattern is the next number
    return stored
