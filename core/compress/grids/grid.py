"""A grid: which codes there are, and how large a step between two of them is.

A grid of b bits has the codes −2^(b−1) … 2^(b−1)−1, and a code q stands for scale · (q − zero_point); a grid of floats has the numbers of
e4m3 (8 bits) or e2m1 (4 bits) for codes, and no zero points. Scales are rounded *up* to the dtype they are stored in, so that nothing is
clipped by more than its rounding: |w − ŵ| ≤ scale/2 for every finite weight.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

#: The numbers of e2m1 from zero up; their places are its codes without a sign.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST_FLOAT = {8: 448.0, 4: 6.0}
SMALLEST_SCALE = 2.0**-100  #: its reciprocal is still finite in float32
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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
        lies half a step above the highest: if both extremes were treated alike, the lowest would be half a step off, too, and the steps would be coarser.
        """
        below = self.top if self.kind == "int" else self.reach
        return torch.maximum(-low / below, high / self.reach)

    def groups(self, columns: int) -> int:
        """Scales a row. The columns must be a multiple of the group size."""
        return 1 if self.group_size is None else columns // self.group_size


def round_up(scale: Tensor, stored: torch.dtype) -> Tensor:
    """The smallest numbers of the dtype `stored` that are no smaller than these positive numbers, in that dtype."""
    scale = scale.clamp(min=SMALLEST_SCALE)
    held = scale.to(stored, copy=True)
    held.view(bits_of(stored)).add_(widen(held) < scale)  # the next bit pattern is the next number
    return held


def bits_of(dtype: torch.dtype) -> torch.dtype:
    """The integers of a float dtype's width, for its bit patterns."""
    return _INTEGERS[dtype.itemsize]


def widen(values: Tensor) -> Tensor:
    """In float32; float64 stays."""
    return values if values.dtype == torch.float64 else values.float()
