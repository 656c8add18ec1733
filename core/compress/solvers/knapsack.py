"""Choose one option for each item so that the sum of errors is least and the sum of sizes is within a budget."""

from collections.abc import Sequence

import numpy as np

_STEPS = (64, 20_000)  #: steps that the budget is divided into: for each item, and at most in total


def choose(sizes: Sequence[Sequence[int]], errors: Sequence[Sequence[float]], budget: int) -> tuple[int, ...]:
    """Return the index of each item's option. sizes and errors are indexed [item][option]. The result is deterministic.

    Dynamic programming over the part of the budget that exceeds the smallest options, in equal steps. Sizes are rounded up to whole steps.
    The budget that this rounding leaves unused is spent on the options that reduce the error most. Raises ValueError if the smallest
    options exceed the budget.
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
