"""Schedules whose fires begin studies, with a real database and a clock that the test moves."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.wire.schedules import ScheduleCreate, ScheduleUpdate
from nightpress.core.wire.studies import StudyRequest
from tests.integration.test_schedules import NIGHTLY, TENANT, World
from tests.studies import GATES, SPACE, StudyWorld

STUDY = StudyRequest(model="tiny", gates=GATES, space=SPACE, trials=3, parallel=1)


@pytest.fixture
def world(tmp_path: Path, sqlite_url: str, bert_tiny: Path) -> Iterator[World]:
    world = World(tmp_path, sqlite_url, bert_tiny)
    yield world
    world.engine.dispose()


@pytest.mark.slow
def test_each_fire_begins_a_study_that_starts_from_the_front_of_the_last(world: World):
    service = StudyWorld.beside(world.engine, world.settings)
    made = world.schedule("2026-11-23T02:00", study=STUDY)
    assert made.study == STUDY
    assert (made.job.model, made.job.recipe) == ("tiny", "study")
    for _ in range(3):
        world.tick("2026-11-23T02:00")
    [run] = world.runs()
    assert (run.state, run.job_id, run.study_state) == ("submitted", None, "searching")
    first = service.studies.store.get(TENANT, str(run.study_id))
    world.tick("2026-11-23T03:00")  # the study still goes on
    assert world.outcomes()[1] == ("03:00", "overlap")
    assert service.run(first, lambda recipe: (recipe["passes"][0]["bits"] / 32, 0.99)).verdict == "accepted"
    assert world.runs()[0].study_verdict == "accepted"
    world.tick("2026-11-23T04:00")
    second = service.studies.store.get(TENANT, str(world.runs()[2].study_id))
    assert second.id != first.id
    front = [trial for trial in service.trials(first) if trial.state == "kept" and trial.role == "search"]
    service.replica().advance()
    best = min(front, key=lambda trial: (trial.goal, trial.number))
    assert service.trials(second)[0].choices == best.choices
    edited = world.service.edit(TENANT, "nightly", ScheduleUpdate(job=NIGHTLY))
    assert (edited.study, edited.job.recipe) == (None, "int8-encoder")


def test_a_study_is_skipped_where_nothing_has_changed_and_replaced_where_that_is_wanted(world: World):
    service = StudyWorld.beside(world.engine, world.settings)
    world.schedule("2026-11-23T02:00", study=STUDY, overlap="replace", only_if_changed=True)
    world.tick("2026-11-23T02:00")
    first = service.studies.store.get(TENANT, str(world.runs()[0].study_id))
    world.tick("2026-11-23T03:00")
    assert world.outcomes() == [("02:00", "submitted"), ("03:00", "unchanged")]
    world.service.edit(TENANT, "nightly", ScheduleUpdate(study=STUDY.model_copy(update={"trials": 2})))
    world.tick("2026-11-23T04:00")
    assert world.outcomes()[0] == ("02:00", "submitted")
    assert service.studies.store.get(TENANT, first.id).state == "cancelling"
    assert world.runs()[2].study_state == "searching"


def test_a_study_that_can_never_work_makes_no_schedule(world: World):
    wrong = STUDY.model_copy(update={"space": [{"passes": [{"pass": "nothing"}], "exports": ["onnx"]}]})
    with pytest.raises(NightpressError) as refused:
        world.schedule("2026-11-23T02:00", study=wrong)
    assert refused.value.code is ErrorCode.INVALID_RECIPE
    for both in ({"job": NIGHTLY, "study": STUDY}, {}):
        with pytest.raises(ValidationError):
            ScheduleCreate(name="x", cron="0 2 * * *", **both)
