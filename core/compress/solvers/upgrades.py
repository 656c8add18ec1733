"""Order the upgrades of all items by what each gains for its size, from the smallest options to the best ones."""

from collections.abc import Sequence
from itertools import pairwise


def upgrades(sizes: Sequence[Sequence[int]], errors: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """Return (item, new option) for each upgrade: the first lowers the errors' sum most for each unit of size.

    sizes and errors are indexed [item][option]. Each item starts with its smallest option, and goes along the lower convex hull of its
    options, so that its upgrades come in order. Those that don't lower the error come last. The result is deterministic.
    """
    steps: list[tuple[float, int, int, int]] = []
    for item, (some, lost) in enumerate(zip(sizes, errors, strict=True)):
        order = sorted(range(len(some)), key=lambda at: (some[at], lost[at], at))
        hull = [order[0]]
        for option in order[1:]:
            if some[option] == some[hull[-1]]:
                continue
            while len(hull) > 1 and _gain(some, lost, hull[-2], hull[-1]) <= _gain(some, lost, hull[-1], option):
                hull.pop()
            hull.append(option)
        steps += [
            (-_gain(some, lost, before, after), item, at, after) for at, (before, after) in enumerate(pairwise(hull))
        ]
    return [(item, after) for _, item, _, after in sorted(steps)]


def _gain(sizes: Sequence[int], errors: Sequence[float], before: int, after: int) -> float:
    """How much an upgrade lowers the error for each unit of size."""
    return (errors[before] - errors[after]) / (sizes[after] - sizes[before])
