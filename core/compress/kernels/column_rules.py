"""The rules for the columns of a block of a weight: a grid of values, and a mask of zeros."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class BlockGrid:
    """The grid of a block's columns: a weight becomes scale · (code − zero_point), with lowest ≤ code ≤ highest.

    fp4: it becomes scale times the nearest number of e2m1 instead.
    """

    scale: Tensor  #: [..., rows, groups], in the weight's dtype
    zero_point: Tensor  #: [..., rows, groups], in the weight's dtype
    group: Tensor  #: int32 [..., columns], the index of each column's scale
    lowest: int
    highest: int
    fp4: bool = False


@dataclass(frozen=True)
class BlockMask:
    """The weights of a block that become zero: given by a mask, or by an N:M pattern."""

    given_mask: Tensor | None = None  #: bool [..., rows, columns], True for the weights that become zero
    #: (kept, of): of every `of` neighbours in a row, the `kept` with the largest (weight · cost)² stay; chosen when the columns are reached
    pattern: tuple[int, int] | None = None
