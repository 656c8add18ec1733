"""Schedules against a real database: what each fire comes to, with a clock that the test moves (F23)."""

import datetime as dt
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from core.access.quotas import QuotaBook
from core.artifacts.storage import open_store
from core.database import make_engine, transaction
from core.errors import ErrorCode, NightpressError
from core.jobs.records import WorkerOffer
from core.jobs.service import JobService
from core.jobs.store import JobStore
from core.jobs.tables import jobs
from core.registry.datasets import DataSetRegistry
from core.registry.models import ModelRegistry
from core.schedules.firing import Firing
from core.schedules.service import ScheduleService
from core.schedules.store import ScheduleStore
from core.schedules.tables import schedules
from core.schemas import JobSpec, ModelCreate, ScheduleCreate, ScheduleRunView, ScheduleUpdate, ScheduleView
from core.settings import Settings

TENANT = "default"
HOUR = dt.timedelta(hours=1)


class World:
    """A service without processes, whose schedules begin a day before `now`."""

    def __init__(self, folder: Path, sql_url: str, model: Path) -> None:
        settings = Settings(_env_file=None, data_dir=folder, database_url=sql_url, model_roots=[model.parent])
        self.engine = make_engine(sql_url)
        objects = open_store(settings)
        self.store = JobStore(self.engine)
        self.models = ModelRegistry(self.engine, objects, settings)
        jobs = JobService(
            self.store,
            self.models,
            DataSetRegistry(self.engine, objects, settings),
            QuotaBook(self.engine, settings),
            settings,
        )
        self.schedules = ScheduleStore(self.engine)
        self.service = ScheduleService(self.schedules, jobs, settings)
        self.rung: list[str] = []
        self.firing = Firing(self.schedules, jobs, self.store, self.rung.append)
        self.model = model
        self.bring()

    def bring(self) -> None:
        self.models.create(TENANT, ModelCreate(name="tiny", path=str(self.model)))

    def schedule(self, first: str, cron: str = "0 * * * *", **more: Any) -> ScheduleView:
        job = JobSpec(model="tiny", recipe="int8-encoder")
        made = self.service.create(TENANT, ScheduleCreate(name="nightly", cron=cron, job=job, **more))
        with transaction(self.engine) as connection:
            moved = update(schedules).where(schedules.c.id == made.id).values(next_at=utc(first))
            connection.execute(moved)
        return made

    def tick(self, now: str) -> None:
        self.firing.fire(utc(now))
        self.firing.advance()

    def runs(self) -> list[ScheduleRunView]:
        """Oldest fire first."""
        return sorted(
            self.schedules.runs(TENANT, "nightly", cursor=None, limit=200)[0], key=lambda run: run.scheduled_for
        )

    def outcomes(self) -> list[tuple[str, str]]:
        return [(f"{run.scheduled_for:%H:%M}", run.reason or run.state) for run in self.runs()]

    def end_jobs(self) -> None:
        while (claimed := self.store.claim(WorkerOffer("w", "cpu", "cpu", 1 << 40, 1), ttl_s=60)) is not None:
            fault = NightpressError(ErrorCode.NUMERICAL_FAILURE, "over")
            self.store.fail(claimed.lease, fault, backoff_s=0)


def utc(text: str) -> dt.datetime:
    return dt.datetime.fromisoformat(text).replace(tzinfo=dt.UTC)


@pytest.fixture
def world(tmp_path: Path, sqlite_url: str, bert_tiny: Path) -> Iterator[World]:
    world = World(tmp_path, sqlite_url, bert_tiny)
    yield world
    world.engine.dispose()


def test_a_fire_becomes_one_job_however_often_it_is_looked_at(world: World):
    world.schedule("2026-11-23T02:00")
    for _ in range(3):
        world.tick("2026-11-23T02:00")
    assert world.outcomes() == [("02:00", "submitted")]
    jobs, _ = world.store.page(TENANT)
    assert [job.id for job in jobs] == [world.runs()[0].job_id]
    assert world.rung == ["cpu"]
    world.tick("2026-11-23T02:59")
    assert len(world.runs()) == 1


@pytest.mark.parametrize(
    ("catch_up", "expected"),
    [
        ("none", ["missed", "missed", "missed", "submitted"]),
        ("latest", ["missed", "missed", "missed", "submitted"]),
        ("all", ["submitted", "submitted", "submitted", "submitted"]),
    ],
)
def test_after_a_long_night_without_a_control_process(world: World, catch_up: str, expected: list[str]):
    world.schedule("2026-11-23T02:00", catch_up=catch_up, overlap="queue")
    for _ in range(6):
        world.tick("2026-11-23T05:01")
        world.end_jobs()
    assert [outcome for _, outcome in world.outcomes()] == expected
    assert [when for when, _ in world.outcomes()] == ["02:00", "03:00", "04:00", "05:00"]


def test_none_catches_up_nothing_and_latest_one_when_all_are_late(world: World):
    world.schedule("2026-11-23T02:00", catch_up="none")
    world.tick("2026-11-23T04:30")
    assert [outcome for _, outcome in world.outcomes()] == ["missed"] * 3
    assert world.store.page(TENANT)[0] == []


def test_years_of_downtime_are_bounded(world: World):
    world.schedule("2016-11-23T02:00", cron="*/5 * * * *", catch_up="all", overlap="queue")
    world.firing.fire(utc("2026-11-23T05:00"))
    assert len(world.runs()) == 100
    assert world.runs()[-1].scheduled_for == utc("2026-11-23T05:00")


def test_skip_leaves_out_what_comes_too_soon(world: World):
    world.schedule("2026-11-23T02:00", overlap="skip")
    world.tick("2026-11-23T02:00")
    world.tick("2026-11-23T03:00")
    world.end_jobs()
    world.tick("2026-11-23T04:00")
    assert world.outcomes() == [("02:00", "submitted"), ("03:00", "overlap"), ("04:00", "submitted")]


def test_queue_waits_for_the_one_before(world: World):
    world.schedule("2026-11-23T02:00", overlap="queue")
    world.tick("2026-11-23T02:00")
    world.tick("2026-11-23T03:00")
    assert world.outcomes() == [("02:00", "submitted"), ("03:00", "pending")]
    world.end_jobs()
    world.tick("2026-11-23T03:10")
    assert world.outcomes() == [("02:00", "submitted"), ("03:00", "submitted")]


def test_replace_cancels_the_one_before(world: World):
    world.schedule("2026-11-23T02:00", overlap="replace")
    world.tick("2026-11-23T02:00")
    world.tick("2026-11-23T03:00")
    first, second = world.runs()
    assert (first.job_state, second.job_state) == ("cancelled", "queued")


def test_only_if_changed_runs_for_new_bytes_alone(world: World, tmp_path: Path):
    world.schedule("2026-11-23T02:00", only_if_changed=True)
    world.tick("2026-11-23T02:00")
    [claimed] = [world.store.claim(WorkerOffer("w", "cpu", "cpu", 1 << 40, 1), ttl_s=60)]
    assert claimed is not None  # it runs: not failed, so its digest counts
    world.schedules.edit(TENANT, world.schedules.get(TENANT, "nightly"), {"overlap": "queue"})
    world.store.fail(claimed.lease, NightpressError(ErrorCode.NUMERICAL_FAILURE, "over"), backoff_s=0)
    world.tick("2026-11-23T03:00")
    assert world.outcomes()[-1] == ("03:00", "submitted")  # the last one failed: try again
    claimed = world.store.claim(WorkerOffer("w", "cpu", "cpu", 1 << 40, 1), ttl_s=60)
    assert claimed is not None
    with transaction(world.engine) as connection:
        done = {"state": "succeeded", "verdict": "accepted", "lease_id": None, "lease_expires_at": None}
        connection.execute(
            update(jobs)
            .where(jobs.c.id == claimed.job.id)
            .values(**done, finished_at=select(jobs.c.created_at).where(jobs.c.id == claimed.job.id).scalar_subquery())
        )
    world.tick("2026-11-23T04:00")
    assert world.outcomes()[-1] == ("04:00", "unchanged")
    world.service.trigger(TENANT, "nightly")
    world.firing.advance()
    assert world.runs()[-1].state == "submitted"  # a person asked
    world.end_jobs()


def test_a_schedule_that_cannot_submit_says_why_and_goes_on(world: World):
    world.schedule("2026-11-23T02:00")
    world.models.delete(TENANT, "tiny")
    world.tick("2026-11-23T02:00")
    [run] = world.runs()
    assert (run.state, (run.error or {}).get("code")) == ("failed", "not_found")
    world.bring()
    world.tick("2026-11-23T03:00")
    assert world.runs()[-1].state == "submitted"


def test_suspended_it_does_not_fire_and_resumed_it_forgets_what_it_missed(world: World):
    made = world.schedule("2026-11-23T02:00")
    world.service.edit(TENANT, "nightly", ScheduleUpdate(suspended=True))
    world.tick("2026-11-23T05:00")
    assert world.runs() == []
    assert world.service.trigger(TENANT, "nightly").cause == "manual"
    resumed = world.service.edit(TENANT, "nightly", ScheduleUpdate(suspended=False))
    assert resumed.upcoming[0] > world.schedules.now()
    assert resumed.version == made.version + 2


def test_another_zone_counts_the_next_fire_anew(world: World):
    world.schedule("2026-11-23T02:00", cron="0 2 * * *")
    before = world.schedules.get(TENANT, "nightly").upcoming[0]
    after = world.service.edit(TENANT, "nightly", ScheduleUpdate(timezone="Asia/Tokyo")).upcoming[0]
    assert after.hour == 17  # two in Tokyo
    assert after != before
    world.tick("2026-11-23T02:00")
    assert world.runs() == []


def test_an_edit_of_an_old_version_is_refused(world: World):
    world.schedule("2026-11-23T02:00")
    world.service.edit(TENANT, "nightly", ScheduleUpdate(overlap="queue"), version=1)
    with pytest.raises(NightpressError) as caught:
        world.service.edit(TENANT, "nightly", ScheduleUpdate(overlap="skip"), version=1)
    assert caught.value.code is ErrorCode.PRECONDITION_FAILED


def test_two_schedules_of_one_name_are_a_conflict(world: World):
    world.schedule("2026-11-23T02:00")
    with pytest.raises(NightpressError) as caught:
        world.schedule("2026-11-23T02:00")
    assert caught.value.code is ErrorCode.CONFLICT
