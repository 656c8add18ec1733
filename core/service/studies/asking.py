"""What the control process keeps of a study between two steps, so that a step costs as much after 2,000 trials as after ten.

All of it comes from rows and could be read again: another replica, or this one after a restart, proposes the same. The row of a trial that
has ended changes no more. A point of the space that can't work never can.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nightpress.core.errors import NightpressError
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.plan import make_plan
from nightpress.core.recipes.search.space import Params, Space, Value, digest_of
from nightpress.core.service.studies.records import NewTrial, Study, Trial
from nightpress.core.service.studies.service import surely_too_large, trial_recipe

if TYPE_CHECKING:
    from nightpress.core.service.studies.proposing import Sampler


class Asking:
    """A study's trials, and the next trials made from them."""

    def __init__(self, study: Study, header: ModelHeader) -> None:
        self.trials: list[Trial] = []  #: all that were read, in the order of their numbers
        self.settled = 0  #: the trials before this number have ended, and need not be read again
        self._begun: dict[int, Params] = {}  #: trials that were begun since rows were read
        self._study = study
        self._header = header
        self._space = Space(study.space["recipes"])
        self._starts = [start for start in study.starts if self._space.holds(start)]
        self._tried: set[tuple[tuple[str, Value], ...]] = set()  #: points of trials, and points that can't work
        self._digests: set[str] = set()
        self._sampler: Sampler | None = None
        self._exhausted = False

    def take(self, rows: Sequence[Trial]) -> None:
        """Take in the rows of all trials from number `settled` on."""
        self.trials[self.settled :] = rows
        self._begun = {}
        for trial in rows:
            self._tried.add(_key(trial.params))
            self._digests.add(trial.digest)
        while self.settled < len(self.trials) and self.trials[self.settled].state != "open":
            self.settled += 1

    def begun(self, trial: NewTrial) -> None:
        """Take note of a trial that was begun."""
        self._begun[trial.number] = trial.params
        self._tried.add(_key(trial.params))
        self._digests.add(trial.digest)

    def next(self, number: int, known: int) -> NewTrial | None:
        """Return the trial of this number, made from the results of the first `known`; None if nothing new can be found in the space."""
        if self._exhausted:
            return None

        def accept(point: Params) -> NewTrial | None:
            return self._accepted(number, known, point)

        for start in self._starts:
            if (trial := accept(start)) is not None:
                return trial
        pending = {trial.number: trial.params for trial in self.trials[known:]} | self._begun
        found = self._sampling().propose(number, self.trials[:known], pending, accept)
        self._exhausted = found is None
        return found

    def _sampling(self) -> "Sampler":
        # Here and not at the top, because only a process that proposes trials needs Optuna and NumPy.
        from nightpress.core.service.studies.proposing import Sampler

        if self._sampler is None:
            self._sampler = Sampler(self._space, self._study.seed)
        return self._sampler

    def _accepted(self, number: int, known: int, point: Params) -> NewTrial | None:
        """Return the trial at a point; None if it was tried before, or if its plan says that it can't work."""
        key = _key(point)
        if key in self._tried:
            return None
        trial = self._planned(number, known, point)
        if trial is None:
            self._tried.add(key)
        return trial

    def _planned(self, number: int, known: int, point: Params) -> NewTrial | None:
        try:
            recipe = trial_recipe(self._study.space, self._space.at(point), self._study.gates, "search")
            # The fleet is left out: a proposal must not depend on which workers there are.
            plan = make_plan(recipe, self._header)
        except NightpressError:
            return None
        settled = plan.recipe.model_dump(mode="json")
        digest = digest_of(settled)
        assert plan.estimate is not None
        sizes = list(plan.estimate.output_bytes.values())
        if digest in self._digests or surely_too_large(plan.recipe, sizes, self._header.size):
            return None
        return NewTrial(number=number, role="search", params=point, known=known, recipe=settled, digest=digest)


def _key(point: Params) -> tuple[tuple[str, Value], ...]:
    return tuple(sorted(point.items()))
