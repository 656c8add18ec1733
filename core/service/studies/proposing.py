"""Proposes the next point of a space: Optuna's TPE, as a function of the seed, the trial's number and the trials before it.

Optuna's study is rebuilt from rows for each proposal. It sees the best of the known trials and the newest ones, so that a proposal costs
the same after 2,000 trials as after 200.
"""

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from heapq import nsmallest
from typing import Any, TypeVar

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from nightpress.core.recipes.search.space import Ask, Choice, Domain, Params, Space, Value
from nightpress.core.service.studies.records import Trial

_STARTUP = 10  #: trials that are drawn at random, after those that a study names, before the sampler is asked
_BEST, _NEWEST = 30, 70  #: known trials that the sampler sees
_DRAWN, _RANDOM = (
    12,
    300,
)  #: points that the sampler draws, and then points at random, before the space is taken for exhausted
_FAILED = 10.0  #: the miss of a trial that failed: larger than of any that was measured

Accepted = TypeVar("Accepted")


class Sampler:
    """Proposes points for a study. It keeps what it made of the rows that it saw last, and nothing else."""

    def __init__(self, space: Space, seed: int) -> None:
        self._space = space
        self._seed = seed
        self._made: dict[tuple[int, TrialState], FrozenTrial] = {}

    def propose(
        self,
        number: int,
        known: Sequence[Trial],
        pending: Mapping[int, Params],
        accept: Callable[[Params], Accepted | None],
    ) -> Accepted | None:
        """Return what `accept` makes of a new point; None if no point of many was accepted.

        known: trials with results. pending: number → point of the trials without; the sampler keeps away from these points.
        accept: returns None for a point that was tried before, or that can't work.
        """
        study = self._study(known, pending)
        informed = len(known) >= _STARTUP
        for attempt in range(_DRAWN + _RANDOM):
            study.sampler = _sampler(self._seed, number, attempt, tpe=informed and attempt < _DRAWN)
            trial = study.ask()
            point = _point(self._space, trial)
            accepted = accept(point)
            if accepted is not None:
                return accepted
            study.tell(trial, state=TrialState.FAIL)
        return None

    def _study(self, known: Sequence[Trial], pending: Mapping[int, Params]) -> optuna.Study:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        earlier, self._made = self._made, {}
        study = optuna.create_study()
        for trial in _seen([trial for trial in known if trial.state != "cancelled"]):
            key = (trial.number, TrialState.COMPLETE)
            self._made[key] = earlier.get(key) or _ended(self._space, trial)
        for number, params in list(pending.items())[-_NEWEST:]:
            key = (number, TrialState.RUNNING)
            self._made[key] = earlier.get(key) or _running(self._space, params)
        for made in self._made.values():
            study.add_trial(made)
        return study


class _Flat(FrozenTrial):
    """A trial whose deep copy is a flat one. A study in memory copies each trial that it is told deeply, only to give it a number."""

    def __init__(self, trial: FrozenTrial) -> None:
        self.__dict__.update(trial.__dict__)

    def __deepcopy__(self, _memo: dict[int, Any]) -> "_Flat":
        return copy.copy(self)


def _seen(known: Sequence[Trial]) -> list[Trial]:
    if len(known) <= _BEST + _NEWEST:
        return list(known)
    best = nsmallest(_BEST, known[:-_NEWEST], key=lambda trial: (max(0.0, _missed(trial)), _goal(trial), trial.number))
    return [*sorted(best, key=lambda trial: trial.number), *known[-_NEWEST:]]


def _missed(trial: Trial) -> float:
    return _FAILED if trial.margin is None else trial.margin


def _goal(trial: Trial) -> float:
    return 1.0 if trial.goal is None else trial.goal


def _ended(space: Space, trial: Trial) -> FrozenTrial:
    return _Flat(
        create_trial(
            value=_goal(trial),
            params=dict(trial.params),
            distributions=_distributions(space, trial.params),
            constraints=_constraints(trial),
        )
    )


def _running(space: Space, params: Params) -> FrozenTrial:
    distributions = _distributions(space, params)
    return _Flat(create_trial(state=TrialState.RUNNING, params=dict(params), distributions=distributions))


def _constraints(trial: Trial) -> dict[str, float]:
    """Gate → by how much it is missed. A trial without figures misses all that could be missed."""
    if not trial.gates or (trial.goal is None and trial.state != "screened"):
        return {"failed": _FAILED}
    return {str(figure["gate"]): float(figure["miss"]) for figure in trial.gates}


def _distributions(space: Space, params: Params) -> dict[str, BaseDistribution]:
    return {path: _distribution(domain) for path, domain in space.domains(params).items()}


def _distribution(domain: Domain) -> BaseDistribution:
    if isinstance(domain, Choice):
        if domain.ordered:
            return IntDistribution(0, len(domain.options) - 1)
        return CategoricalDistribution(tuple(range(len(domain.options))))
    step = (1 if domain.whole else None) if domain.step is None else domain.step
    # Optuna warns where the step does not divide the range.
    high = domain.high if step is None else domain.low + int((domain.high - domain.low) / step + 1e-9) * step
    if domain.whole:
        return IntDistribution(int(domain.low), int(high), log=domain.log, step=int(step or 1))
    return FloatDistribution(domain.low, high, log=domain.log, step=step)


def _point(space: Space, trial: optuna.Trial) -> Params:
    chosen: dict[str, Value] = {}

    def ask(path: str, domain: Domain) -> Value:
        chosen[path] = _suggested(trial, path, _distribution(domain))
        return chosen[path]

    asking: Ask = ask
    space.build(asking)
    return chosen


def _suggested(trial: optuna.Trial, path: str, known: BaseDistribution) -> Value:
    match known:
        case IntDistribution():
            return trial.suggest_int(path, known.low, known.high, step=known.step, log=known.log)
        case FloatDistribution():
            return trial.suggest_float(path, known.low, known.high, step=known.step, log=known.log)
        case CategoricalDistribution():
            return int(trial.suggest_categorical(path, known.choices))  # type: ignore[arg-type]  # the choices are indices
    raise AssertionError(known)


def _sampler(seed: int, number: int, attempt: int, *, tpe: bool) -> BaseSampler:
    mixed = int.from_bytes(hashlib.sha256(f"{seed}/{number}/{attempt}".encode()).digest()[:4]) >> 1
    if not tpe:
        return RandomSampler(seed=mixed)
    return TPESampler(seed=mixed, n_startup_trials=0)
