"""Chooses among trials: the front, the winner's candidates, and the nearest trial on the other side of the gates. Pure functions of rows."""

from collections.abc import Sequence

from nightpress.core.recipes.search.space import Space
from nightpress.core.service.studies.records import Trial
from nightpress.core.wire.studies import Sensitivity

_BINS = 4  #: groups of equal size into which the numbers of a range are divided


def front_of(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials of the search that keep every gate and that no other beats by goal and by margin. The best goal comes first."""
    kept = [trial for trial in trials if trial.role == "search" and trial.state == "kept"]
    found: list[Trial] = []
    for trial in sorted(kept, key=_by_goal):
        if not found or _margin(trial) < _margin(found[-1]):
            found.append(trial)
    return found


def candidates_of(trials: Sequence[Trial], count: int) -> list[Trial]:
    """Return the trials to measure again: the front from its best goal on, filled up with the next best goals."""
    front = front_of(trials)[:count]
    kept = [trial for trial in trials if trial.role == "search" and trial.state == "kept" and trial not in front]
    return sorted([*front, *sorted(kept, key=_by_goal)[: count - len(front)]], key=_by_goal)


def runner_up_of(trials: Sequence[Trial], winner: Trial | None) -> Trial | None:
    """Return the trial that misses the gates by least among those with a better goal than the winner's; None if there is none."""
    missed = [
        trial
        for trial in trials
        if trial.role == "search" and trial.state == "missed" and trial.goal is not None and trial.margin is not None
    ]
    better = [trial for trial in missed if winner is None or _goal(trial) < _goal(winner)]
    return min(better, key=lambda trial: (_margin(trial), _goal(trial), trial.number), default=None)


def sensitivity_of(trials: Sequence[Trial], space: Space) -> list[Sensitivity]:
    """Return for each parameter the share of the goal's variance that its value explains, the largest first.

    This is ω² of a one-way analysis of variance (Hays 1963), over the trials that had the parameter and a goal. It is adjusted for the
    number of values, so that a parameter with a value of its own in each trial explains nothing.
    """
    measured = [
        trial for trial in trials if trial.role == "search" and trial.goal is not None and space.holds(trial.params)
    ]
    values: dict[str, list[tuple[float, float]]] = {}
    for trial in measured:
        for path, value in trial.params.items():
            values.setdefault(path, []).append((float(value), _goal(trial)))
    found = [
        Sensitivity(parameter=path, share=share, trials=len(pairs))
        for path, pairs in values.items()
        if (share := _explained(pairs)) is not None
    ]
    return sorted(found, key=lambda entry: (-entry.share, entry.parameter))


def _explained(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Return ω² of the goals grouped by value; None if there are too few trials or a single value. pairs: (value, goal)."""
    groups = _grouped(pairs)
    goals = [goal for _, goal in pairs]
    freedom = len(goals) - len(groups)
    if len(groups) < 2 or freedom < 1:
        return None
    mean = sum(goals) / len(goals)
    total = sum((goal - mean) ** 2 for goal in goals)
    within = sum(sum((goal - sum(group) / len(group)) ** 2 for goal in group) for group in groups)
    spread = within / freedom
    if total <= 0:
        return 0.0
    return round(max(0.0, (total - within - (len(groups) - 1) * spread) / (total + spread)), 4)


def _grouped(pairs: Sequence[tuple[float, float]]) -> list[list[float]]:
    values = sorted({value for value, _ in pairs})
    if len(values) > 2 * _BINS:
        ordered = sorted(pairs)
        size = -(-len(ordered) // _BINS)
        return [[goal for _, goal in ordered[at : at + size]] for at in range(0, len(ordered), size)]
    return [[goal for value, goal in pairs if value == wanted] for wanted in values]


def _by_goal(trial: Trial) -> tuple[float, float, int]:
    return _goal(trial), _margin(trial), trial.number


def _goal(trial: Trial) -> float:
    return float("inf") if trial.goal is None else trial.goal


def _margin(trial: Trial) -> float:
    return float("inf") if trial.margin is None else trial.margin
