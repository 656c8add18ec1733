"""Divides the examples of an evaluation among a data set's slices, the values of its column `slice`."""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from nightpress.core.compress.data.rows import Row

Slices = tuple[str | None, ...]  #: the slice of each example; None: it belongs to none


def draw(slices: Sequence[Hashable], samples: int, seed: int) -> NDArray[np.int64]:
    """Draw rows without replacement: their indices in the order of the draw. Every slice gets an equal share, as far as it has rows.

    slices: of each row. Rows without a slice count as a slice of their own.
    """
    order = np.random.default_rng(seed).permutation(len(slices)).astype(np.int64)
    counts = Counter(slices)
    if len(counts) < 2 or samples >= len(order):
        return order[:samples]
    left = dict(zip(counts, shares(list(counts.values()), samples), strict=True))
    chosen = []
    for at in order:
        if left[slices[at]]:
            left[slices[at]] -= 1
            chosen.append(at)
    return np.asarray(chosen, np.int64)


def shares(available: Sequence[int], wanted: int) -> list[int]:
    """Divide a number into equal parts, of which none is more than what is available. What one part can't take goes to the others."""
    parts, left = [0] * len(available), min(wanted, sum(available))
    for place, at in enumerate(sorted(range(len(available)), key=lambda at: available[at])):
        # From the smallest up, each gets its share of what is left. Of a remainder, the larger ones get one more.
        parts[at] = min(available[at], left // (len(available) - place))
        left -= parts[at]
    return parts


def slices_of(names: Iterable[str | None]) -> Slices | None:
    """The slice of each example; None if no example has one."""
    found = tuple(names)
    return found if any(name is not None for name in found) else None


def by_slice(rows: Sequence[Row]) -> dict[str | None, list[Row]]:
    """The rows of each slice, in their order."""
    found: dict[str | None, list[Row]] = {}
    for row in rows:
        found.setdefault(row.slice, []).append(row)
    return found


def evenly(count: int, wanted: int) -> NDArray[np.int64]:
    """At most `wanted` of the indices below `count`, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(wanted, count)).round().astype(np.int64))
