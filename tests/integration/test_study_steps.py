"""Steps of the control process for studies: what a step reads, and that what it keeps between steps changes no proposal."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, update

from nightpress.core.database import db_now, transaction
from nightpress.core.service.studies.searching import Searching
from nightpress.core.service.tables.jobs import job_attempts, jobs
from nightpress.core.wire.studies import StudyView
from tests.studies import SPACE, TENANT, StudyWorld


@pytest.fixture
def world(tmp_path: Path, sqlite_url: str, bert_tiny: Path) -> Iterator[StudyWorld]:
    world = StudyWorld(tmp_path, sqlite_url, bert_tiny)
    yield world
    world.engine.dispose()


def salted(seed: int) -> list[dict[str, Any]]:
    """The space with another seed of its recipes, which changes no figure: no job of an earlier study is reused."""
    return [{**SPACE[0], "seed": seed}]


def proposed(world: StudyWorld, study: StudyView) -> list[tuple[int, object, str]]:
    return [(trial.number, trial.choices, trial.state) for trial in world.trials(study)]


def step(world: StudyWorld, control: Searching) -> None:
    control.advance()
    world.claim_all()
    if world.held:
        world.end(world.held[0])


@pytest.mark.slow
def test_a_replica_that_has_just_started_proposes_what_one_that_stayed_would(world: StudyWorld):
    stayed = world.create(trials=18, parallel=2, seed=5, space=salted(1))
    world.run(stayed)
    restarted = world.create(trials=18, parallel=2, seed=5, space=salted(2))
    while world.get(restarted).state != "succeeded":
        step(world, world.replica())
    assert proposed(world, restarted) == proposed(world, stayed)


@pytest.mark.slow
def test_a_proposal_that_found_no_room_is_made_again(tmp_path: Path, world: StudyWorld, bert_tiny: Path):
    free = world.create(trials=14, parallel=4, seed=5, space=salted(1))
    world.run(free)
    narrow = StudyWorld.beside(world.engine, world.settings.model_copy(update={"max_queued_jobs": 1}))
    waiting = narrow.create(trials=14, parallel=4, seed=5, space=salted(2))
    narrow.run(waiting)
    assert proposed(narrow, waiting) == proposed(world, free)


@pytest.mark.slow
def test_a_step_reads_no_trial_again_that_has_ended(world: StudyWorld):
    study = world.create(trials=12, parallel=1)
    control = world.replica()
    firsts: list[int] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if "study_trials.number >= " in statement:
            firsts.append(int(parameters[-1]))

    event.listen(world.engine, "before_cursor_execute", note)
    while world.get(study).state == "searching":
        step(world, control)
    event.remove(world.engine, "before_cursor_execute", note)
    assert firsts[:12] == [max(0, number - 1) for number in range(12)]


def test_seconds_of_each_gpu_of_a_trial_count_in_the_budget(world: StudyWorld):
    study = world.create(trials=40, parallel=1, gpu_hours=1.0)
    control = world.replica()
    control.advance()
    world.claim_all()
    with transaction(world.engine) as connection:
        connection.execute(update(jobs).values(queue="gpu", needs_gpus=2))
        connection.execute(update(job_attempts).values(started_at=db_now(-1700)))
    control.advance()
    assert world.store.reader.page(TENANT)[0][0].state == "running"  # 3,400 seconds of two GPUs
    with transaction(world.engine) as connection:
        connection.execute(update(job_attempts).values(started_at=db_now(-1900)))
    control.advance()
    [claimed] = world.held
    assert world.store.attempts.confirm_cancelled(claimed.lease)
    control.advance()
    ended = world.get(study)
    assert (ended.state, ended.reason) == ("judging", "gpu")
    assert ended.gpu_seconds == pytest.approx(3800, rel=0.2)
    assert ended.cpu_seconds == 0
