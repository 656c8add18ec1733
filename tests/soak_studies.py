"""Studies among random faults: whatever was killed, each ends as the same study does that nothing disturbs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nightpress import migrations
from nightpress.core.wire.models import ModelCreate
from nightpress.core.wire.studies import StudyView
from tests.models import bert_tiny_dir
from tests.service import Service
from tests.studies import SPACE, TENANT, StudyWorld

_TRIALS, _JUDGED = 8, 2


class SoakStudies:
    """The studies of a run of random faults, one after another."""

    def __init__(self, service: Service, folder: Path) -> None:
        self._service, self._folder = service, folder
        self._model = bert_tiny_dir(folder)
        self._world = StudyWorld.beside(service.engine, service.settings)
        self._world.resources.models.create(TENANT, ModelCreate(name="tiny", path=str(self._model)))
        self._begun: list[StudyView] = []

    def begin(self) -> None:
        """Begin a study, if none goes on."""
        if not self._world.ledger.active():
            self._begun.append(self._world.create(**_wanted(len(self._begun))))

    def left(self) -> list[str]:
        """The studies that go on, with the number of their trials that have ended."""
        return [f"{study.id} after {study.told} trials" for study in self._world.ledger.active()]

    def trial_jobs(self) -> list[str]:
        return [str(trial.job_id) for study in self._begun for trial in self._world.trials(study)]

    def violations(self) -> Iterator[str]:
        """What differs from the same studies without faults: trials lost, proposed twice or with other results, another winner."""
        url = f"sqlite:///{self._folder / 'undisturbed.db'}"
        migrations.upgrade(url)
        calm = StudyWorld(self._folder / "undisturbed", url, self._model)
        for number, study in enumerate(self._begun):
            undisturbed = calm.create(**_wanted(number))
            calm.run(undisturbed)
            told, expected = _history(self._world, study), _history(calm, undisturbed)
            if told != expected:
                yield f"study {study.id}: {told} instead of {expected}"
        calm.engine.dispose()


def _wanted(number: int) -> dict[str, Any]:
    # Another seed of the recipes, which changes no figure: so no job's result is reused by a later study.
    space = [{**SPACE[0], "seed": number}]
    return {"trials": _TRIALS, "judge": _JUDGED, "parallel": 3, "seed": number, "space": space}


def _history(world: StudyWorld, study: StudyView) -> dict[str, Any]:
    """All of a study that chance must not decide."""
    ended = world.get(study)
    events = [(event.kind, event.data.get("number")) for event in world.studies.store.events(study.id)]
    winner = world.studies.store.report(TENANT, study.id).winner if ended.state == "succeeded" else None
    return {
        "state": ended.state,
        "trials": [(trial.number, trial.role, trial.choices, trial.state, trial.goal) for trial in world.trials(study)],
        "started": sorted(number for kind, number in events if kind == "trial_started"),
        "ended": sorted(number for kind, number in events if kind == "trial_ended"),
        "winner": None if winner is None else (winner.trial, winner.recipe, winner.goal),
    }
