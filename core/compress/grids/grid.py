"""A grid: the set of codes, and the size of the step between two of them.

An integer grid of b bits has the codes −2^(b−1) … 2^(b−1)−1. The code q stands for scale · (q − zero_point). A grid of floats has the
numbers of e4m3 (8 bits) or e2m1 (4 bits) as codes, and no zero points. Scales are rounded *up* in size to the dtype in which they are stored,
so that clipping costs no more than rounding: |w − ŵ| ≤ |scale|/2 for every finite weight.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

#: The non-negative numbers of e2m1 in ascending order. A number's index is its code without the sign bit.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST_FLOAT = {8: 448.0, 4: 6.0}  #: bits → largest number of e4m3 and of e2m1
SMALLEST_SCALE = 2.0**-100  #: its reciprocal is still finite in float32
_MIRRORED = 4  #: the most bits with which a scale may be negative: with more, the extra code is worth nothing
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Grid:
    """The set of codes, and the weights that share a scale."""

    bits: int
    group_size: int | None = None  #: inputs that share a scale; None: all inputs of a row
    symmetric: bool = True
    kind: Literal["int", "float"] = "int"

    @property
    def is_fp4(self) -> bool:
        """Whether the codes are numbers of e2m1."""
        return self.kind == "float" and self.bits == 4

    @property
    def top(self) -> int:
        """For integers: the largest code plus one, e.g. 8 at 4 bits. Adding it to a code makes the code unsigned."""
        return int(2 ** (self.bits - 1))

    @property
    def reach(self) -> float:
        """The largest magnitude in steps that a symmetric grid can round: half a step above the largest code, or the largest float."""
        return self.top - 0.5 if self.kind == "int" else LARGEST_FLOAT[self.bits]

    @property
    def mirrors(self) -> bool:
        """Whether a scale may be negative: a symmetric grid of few integers then gives the extra code to the side of the largest weight."""
        return self.kind == "int" and self.symmetric and self.bits <= _MIRRORED

    def signed_step(self, low: Tensor, high: Tensor, stored: torch.dtype) -> Tensor:
        """The scale of a symmetric grid as it is stored, in the dtype `stored`. See `step` and `mirrors`."""
        if not self.mirrors:
            step = self.step(low, high)
            if stored == torch.float8_e4m3fn:
                step = step.clamp(max=LARGEST_FLOAT[8])  # a larger one would become NaN
            return round_up(step, stored)
        turned = high > -low
        held = round_up(self.step(torch.where(turned, -high, low), torch.where(turned, -low, high)), stored)
        return torch.where(turned, -held, held)

    def step(self, low: Tensor, high: Tensor) -> Tensor:
        """The size of the step of a symmetric grid for weights from low ≤ 0 to high ≥ 0.

        Integers have one more code below zero than above it. So the lowest weight may be the lowest code, without an error, and the highest
        weight may be half a step above the highest code. If both extremes were treated alike, the lowest weight would also be half a step
        off, and the steps would be coarser.
        """
        below = self.top if self.kind == "int" else self.reach
        return torch.maximum(-low / below, high / self.reach)

    def groups(self, columns: int) -> int:
        """The number of scales in a row. `columns` must be a multiple of the group size."""
        return 1 if self.group_size is None else columns // self.group_size


def round_up(scale: Tensor, stored: torch.dtype) -> Tensor:
    """Round positive scales up to the next number of the dtype `stored`, and return them in that dtype. The least is SMALLEST_SCALE."""
    scale = scale.clamp(min=SMALLEST_SCALE)
    held = scale.to(stored, copy=True)
    held.view(bits_of(stored)).add_(widen(held) < scale)  # the next bit pattern is the next larger number
    return held


def bits_of(dtype: torch.dtype) -> torch.dtype:
    """The integer dtype of the same width as a float dtype, for its bit patterns."""
    return _INTEGERS[dtype.itemsize]


def widen(values: Tensor) -> Tensor:
    """Convert to float32; float64 is returned unchanged."""
    return values if values.dtype == torch.float64 else values.float()
