"""Divides a data set into two halves: with one a study chooses among recipes, with the other it measures what it has chosen.

The division is the same in every study, so that no study chooses with the rows that another judges by.
"""

from collections.abc import Sequence
from typing import Literal, TypeVar

import numpy as np

from nightpress.core.recipes.textfile import invalid

Part = Literal["all", "choose", "judge"]
Item = TypeVar("Item")

_SEED = 0x5EED
RUN = 8  #: neighbouring rows of running text that stay together, so that windows are cut from connected text


def half(rows: Sequence[Item], part: Part, *, ref: str, run: int = 1) -> list[Item]:
    """Return the rows of a part, in their order. run: number of neighbouring rows that stay together.

    Raises NightpressError(invalid_data) if there are too few rows to divide.
    """
    if part == "all":
        return list(rows)
    count = -(-len(rows) // run)
    if count < 2 and run > 1:
        return half(rows, part, ref=ref)
    if count < 2:
        raise invalid(ref, "it has a single row, which can't be divided into two halves", "Bring more rows.")
    order = np.random.default_rng(_SEED).permutation(count)
    chosen = order[: count // 2] if part == "judge" else order[count // 2 :]
    return [row for at in np.sort(chosen) for row in rows[at * run : (at + 1) * run]]
