"""F42: control processes are killed while a study runs: no trial is proposed twice, none is lost, and the same recipe wins."""

from pathlib import Path

import pytest

from nightpress.core.wire.models import ModelCreate
from nightpress.core.wire.studies import StudyView
from tests.service import Service, eventually
from tests.studies import SPACE, TENANT, StudyWorld

KILLS = 3


def told(world: StudyWorld, study: StudyView) -> list[tuple[int, str, object, str]]:
    return [(trial.number, trial.role, trial.choices, trial.state) for trial in world.trials(study)]


@pytest.mark.slow
def test_f42_killed_control_processes_leave_the_study_as_it_would_have_been(
    tmp_path: Path, sql_url: str, bert_tiny: Path
):
    service = Service(tmp_path, sql_url, tick_s=0.05, model_roots=[bert_tiny.parent])
    world = StudyWorld.beside(service.engine, service.settings)
    try:
        world.resources.models.create(TENANT, ModelCreate(name="tiny", path=str(bert_tiny)))
        given = {"trials": 14, "parallel": 3, "seed": 3}
        undisturbed = world.create(**given)
        assert world.run(undisturbed).state == "succeeded"
        # Another seed of the recipes, which changes no figure: so no job's result is reused.
        study = world.create(**given, space=[{**SPACE[0], "seed": 1}])
        controls = [service.start_control(), service.start_control()]

        def progressed(since: int) -> bool:
            world.claim_all()
            for claimed in list(world.held):
                world.end(claimed)
            now = world.get(study)
            return now.state == "succeeded" or now.proposed + now.told >= since

        for at in range(KILLS):
            before = world.get(study)
            eventually(lambda since=before.proposed + before.told + 6: progressed(since), within=60, every=0.01)
            controls[at % 2].kill()
            controls[at % 2] = service.start_control()
        eventually(lambda: progressed(10**6) and world.get(study).state == "succeeded", within=120, every=0.05)
        assert told(world, study) == told(world, undisturbed)
        events = [(event.kind, event.data.get("number")) for event in world.studies.store.events(study.id)]
        for kind in ("trial_started", "trial_ended"):
            numbers = [number for name, number in events if name == kind]
            assert sorted(numbers) == list(range(world.get(study).proposed)), kind
        reports = [world.studies.store.report(TENANT, found.id) for found in (study, undisturbed)]
        assert reports[0].winner is not None
        assert reports[1].winner is not None
        assert reports[0].winner.recipe == reports[1].winner.recipe
        assert reports[0].winner.goal == reports[1].winner.goal
    finally:
        service.close()
