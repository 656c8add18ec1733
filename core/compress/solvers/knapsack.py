"""One choice for each item, so that the errors' sum is least and the sizes' sum within a budget."""

from collections.abc import Sequence

import numpy as np

_STEPS = (64, 20_000)  #: what the budget is divided into: so many an item, at most so many in all


def choose(sizes: Sequence[Sequence[int]], errors: Sequence[Sequence[float]], budget: int) -> tuple[int, ...]:
    """Which option each item takes; sizes and errors by item and option. The same every time.

    Dynamic programming over what the budget leaves beyond the smallest options, in equal steps; sizes are rounded up to them, and what
    that left unused goes to the upgrades that help most. Raises ValueError where the smallest options exceed the budget.
    """
    smallest = [min(some) for some in sizes]
    room = budget - sum(smallest)
    if room < 0:
        raise ValueError(f"the smallest options take {sum(smallest)}, the budget is {budget}")
    step = max(1, -(-room // min(_STEPS[0] * len(sizes), _STEPS[1])))
    width = room // step + 1
    least = np.zeros(width)
    taken = np.zeros((len(sizes), width), np.int16)
    for item, (some, lost) in enumerate(zip(sizes, errors, strict=True)):
        best = np.full(width, np.inf)
        for option, (size, error) in enumerate(zip(some, lost, strict=True)):
            need = -(-(size - smallest[item]) // step)
            if need >= width:
                continue
            candidate = least[: width - need] + error
            better = candidate < best[need:]
            best[need:][better] = candidate[better]
            taken[item, need:][better] = option
        least = best
    chosen, left = [0] * len(sizes), width - 1
    for item in reversed(range(len(sizes))):
        chosen[item] = int(taken[item, left])
        left -= -(-(sizes[item][chosen[item]] - smallest[item]) // step)
    return _fill(chosen, sizes, errors, budget)


def _fill(
    chosen: list[int], sizes: Sequence[Sequence[int]], errors: Sequence[Sequence[float]], budget: int
) -> tuple[int, ...]:
    while True:
        left = budget - sum(some[option] for some, option in zip(sizes, chosen, strict=True))
        upgrades = [
            (errors[item][now] - errors[item][option], -item, option)
            for item, now in enumerate(chosen)
            for option in range(len(sizes[item]))
            if errors[item][option] < errors[item][now] and sizes[item][option] - sizes[item][now] <= left
        ]
        if not upgrades:
            return tuple(chosen)
        _, item, option = max(upgrades)
        chosen[-item] = option
