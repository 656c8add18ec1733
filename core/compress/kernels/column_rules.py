"""What the columns of a block of a weight may become: values of a grid, and zeros of a mask."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class BlockGrid:
    """The grid of a block's columns: a weight becomes scale · (code − zero_point), with lowest ≤ code ≤ highest."""

    scale: Tensor  #: [rows, groups], in the weight's dtype
    zero_point: Tensor  #: [rows, groups], in the weight's dtype
    group: Tensor  #: int32 [columns], which scale a column uses
    lowest: int
    highest: int


@dataclass(frozen=True)
class BlockMask:
    """Which of a block's weights go: those told, or of every `pattern[1]` neighbours all but the `pattern[0]` that matter most."""

    told: Tensor | None = None  #: bool [rows, columns]
    pattern: tuple[int, int] | None = None  #: decided as the columns come, by (weight · cost)²
