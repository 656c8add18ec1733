"""Schedules with a real database: the outcome of each fire, with a clock that the test moves (F23)."""

import datetime as dt
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from nightpress.core.artifacts.open import open_store
from nightpress.core.database import make_engine, transaction
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.manifest import Manifest
from nightpress.core.service.access.quotas import QuotaBook
from nightpress.core.service.jobs.records import Succeeded, WorkerOffer
from nightpress.core.service.jobs.service import JobService
from nightpress.core.service.jobs.store import JobStore
from nightpress.core.service.registry.datasets import DataSetRegistry
from nightpress.core.service.registry.intake import Intake
from nightpress.core.service.registry.models import ModelRegistry
from nightpress.core.service.schedules.bringing import Bringer
from nightpress.core.service.schedules.firing import Firing
from nightpress.core.service.schedules.service import ScheduleService
from nightpress.core.service.schedules.store import ScheduleStore
from nightpress.core.service.studies.ledger import StudyLedger
from nightpress.core.service.studies.service import StudyService
from nightpress.core.service.studies.store import StudyStore
from nightpress.core.service.tables.jobs import jobs
from nightpress.core.service.tables.schedules import schedule_runs, schedules
from nightpress.core.settings import Settings
from nightpress.core.wire.jobs import JobRequest
from nightpress.core.wire.models import ModelCreate
from nightpress.core.wire.schedules import ScheduleCreate, ScheduleRunView, ScheduleUpdate, ScheduleView
from tests.hub import serve_hub
from tests.service import eventually

TENANT = "default"
HOUR = dt.timedelta(hours=1)
NIGHTLY = JobRequest(model="tiny", recipe="int8-encoder")


class World:
    """A service without processes, whose schedules begin a day before `now`."""

    def __init__(self, folder: Path, sql_url: str, model: Path, **more: Any) -> None:
        roots = [model.parent, folder / "roots"]
        settings = Settings(_env_file=None, data_dir=folder, database_url=sql_url, model_roots=roots, **more)
        self.engine = make_engine(sql_url)
        objects = open_store(settings)
        self.store = JobStore(self.engine)
        self.models = ModelRegistry(self.engine, objects, settings)
        jobs = self.jobs = JobService(
            self.store,
            self.models,
            DataSetRegistry(self.engine, objects, settings),
            QuotaBook(self.engine, settings),
            settings,
        )
        self.schedules = ScheduleStore(self.engine)
        self.studies = StudyService(StudyStore(self.engine), StudyLedger(self.engine), jobs, self.store, self.models)
        self.service = ScheduleService(self.schedules, jobs, self.studies, settings)
        self.rung: list[str] = []
        self.settings = settings
        self.intake = Intake(self.engine, (self.models,))
        bringer = Bringer(self.schedules, self.models, settings)
        self.firing = Firing(self.schedules, jobs, self.store, self.studies, bringer, self.rung.append)
        self.model = model
        self.bring()

    def bring(self) -> None:
        self.models.create(TENANT, ModelCreate(name="tiny", path=str(self.model)))

    def schedule(
        self,
        first: str,
        cron: str = "0 * * * *",
        job: JobRequest = NIGHTLY,
        key_id: str | None = None,
        **more: Any,
    ) -> ScheduleView:
        wanted = ScheduleCreate(name="nightly", cron=cron, job=None if "study" in more else job, **more)
        made = self.service.create(TENANT, wanted, key_id=key_id)
        with transaction(self.engine) as connection:
            moved = update(schedules).where(schedules.c.id == made.id).values(next_at=utc(first))
            connection.execute(moved)
        return made

    def tick(self, now: str) -> None:
        self.firing.fire(utc(now))
        self.firing.advance()

    def settle(self, now: str) -> None:
        """Tick until no run is pending."""

        def over() -> bool:
            self.tick(now)
            self.intake.advance()
            return all(run.state != "pending" for run in self.runs())

        eventually(over)

    def runs(self) -> list[ScheduleRunView]:
        """The schedule's runs, the oldest fire first."""
        return sorted(
            self.schedules.runs(TENANT, "nightly", cursor=None, limit=200)[0], key=lambda run: run.scheduled_for
        )

    def outcomes(self) -> list[tuple[str, str]]:
        return [(f"{run.scheduled_for:%H:%M}", run.reason or run.state) for run in self.runs()]

    def end_jobs(self) -> None:
        while (claimed := self.store.claims.claim(WorkerOffer("w", "cpu", "cpu", 1 << 40, 1), ttl_s=60)) is not None:
            fault = NightpressError(ErrorCode.NUMERICAL_FAILURE, "over")
            self.store.attempts.fail(claimed.lease, fault, backoff_s=0)

    def end_jobs_well(self) -> None:
        while (claimed := self.store.claims.claim(WorkerOffer("w", "cpu", "cpu", 1 << 40, 1), ttl_s=60)) is not None:
            manifest = Manifest(
                job_id=claimed.job.id, attempt=claimed.lease.attempt, verdict="accepted", artifacts=(), report=()
            )
            assert self.store.attempts.finish(claimed.lease, Succeeded("accepted", manifest, {}))


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
    jobs, _ = world.store.reader.page(TENANT)
    assert [job.id for job in jobs] == [world.runs()[0].job_id]
    assert world.rung == ["cpu"]
    world.tick("2026-11-23T02:59")
    assert len(world.runs()) == 1


def test_a_replica_that_comes_too_late_is_told_that_another_has_decided(world: World):
    made = world.schedule("2026-11-23T02:00")
    [due] = world.schedules.due(utc("2026-11-23T02:00"))
    for first in (True, False):
        assert world.schedules.record_fires(due, {due.next_at: None}, due.cron.next(due.next_at)) is first
    [run] = world.schedules.pending()
    assert run.schedule_id == made.id
    assert world.schedules.settle(run.id, "skipped", reason="overlap")
    assert not world.schedules.settle(run.id, "failed")
    assert world.outcomes() == [("02:00", "overlap")]


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
    assert world.store.reader.page(TENANT)[0] == []


@pytest.mark.slow
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
    [claimed] = [world.store.claims.claim(WorkerOffer("w", "cpu", "cpu", 1 << 40, 1), ttl_s=60)]
    assert claimed is not None  # it runs and has not failed, so its digest counts
    world.schedules.edit(TENANT, world.schedules.get(TENANT, "nightly"), {"overlap": "queue"})
    world.store.attempts.fail(claimed.lease, NightpressError(ErrorCode.NUMERICAL_FAILURE, "over"), backoff_s=0)
    world.tick("2026-11-23T03:00")
    assert world.outcomes()[-1] == ("03:00", "submitted")  # the last job failed, so the same model is tried again
    claimed = world.store.claims.claim(WorkerOffer("w", "cpu", "cpu", 1 << 40, 1), ttl_s=60)
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
    assert world.runs()[-1].state == "submitted"  # a person asked for this run
    world.end_jobs()


@pytest.mark.parametrize("only_if_changed", [False, True])
@pytest.mark.slow
def test_a_night_with_new_weights_is_not_given_the_last_nights_result(
    tmp_path: Path, sql_url: str, bert_tiny: Path, only_if_changed: bool
):
    folder = tmp_path / "roots" / "tiny"
    shutil.copytree(bert_tiny, folder)
    world = World(tmp_path, sql_url, folder)
    world.schedule("2026-11-23T02:00", only_if_changed=only_if_changed)
    outcomes = []
    for hour, content in enumerate(("first", "second", "second", "first")):
        (folder / "README.md").write_text(content)
        world.bring()
        world.tick(f"2026-11-23T0{2 + hour}:00")
        world.end_jobs_well()
        job = world.store.reader.get(TENANT, str(world.runs()[-1].job_id))
        outcomes.append(None if job is None else (job.model_digest, job.reused_from))
        if job is not None:
            assert job.model_digest == world.models.get(TENANT, "tiny").digest
    (first, _), (second, _) = outcomes[0], outcomes[1]
    made = [run.job_id for run in world.runs()]
    unchanged = None if only_if_changed else (second, made[1])
    assert outcomes == [(first, None), (second, None), unchanged, (first, made[0])]
    world.engine.dispose()


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
    assert after.hour == 17  # two o'clock in Tokyo
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


# Schedules with a source -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_schedule_fetches_what_is_new_at_its_source_and_presses_nothing_twice(
    tmp_path: Path, sqlite_url: str, bert_tiny: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    files = {path.name: path.read_bytes() for path in bert_tiny.iterdir() if path.is_file()}
    with serve_hub() as hub:
        world = World(tmp_path, sqlite_url, bert_tiny, hub_endpoint=hub.url, hub_organisations=["acme"])
        first = hub.push("models/acme/tiny", files)
        world.schedule("2026-11-23T02:00", source="hf://acme/tiny", only_if_changed=True)
        world.settle("2026-11-23T02:00")
        world.end_jobs_well()
        world.settle("2026-11-23T03:00")
        second = hub.push("models/acme/tiny", files | {"README.md": b"retrained"})
        world.settle("2026-11-23T04:00")
        world.end_jobs_well()
        assert [outcome for _, outcome in world.outcomes()] == ["submitted", "unchanged", "submitted"]
        assert [run.revision for run in world.runs()] == [first, first, second]
        jobs, _ = world.store.reader.page(TENANT)
        brought = [world.models.get(TENANT, job.model_id) for job in reversed(jobs)]
        assert [model.revision for model in brought] == [first, second]
        assert {model.name for model in brought} == {"tiny"}
        downloads = [path for path in hub.paths() if path.endswith("model.safetensors") and "/cdn/" in path]
        assert len(downloads) == 2, "what did not change was not fetched again"
        del hub.repositories["models/acme/tiny"]
        world.settle("2026-11-23T05:00")
        assert world.runs()[-1].error["code"] == "not_found"
        hub.push("models/acme/tiny", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
        world.settle("2026-11-23T06:00")
        assert world.runs()[-1].error["code"] == "unsupported_format"
        world.intake.close()
        world.engine.dispose()


@pytest.mark.slow
def test_a_server_folder_is_a_source_too(world: World, tmp_path: Path):
    folder = tmp_path / "roots" / "nightly"
    shutil.copytree(world.model, folder)
    world.schedule("2026-11-23T02:00", source=str(folder), only_if_changed=True)
    world.settle("2026-11-23T02:00")
    world.end_jobs_well()
    world.settle("2026-11-23T03:00")
    (folder / "README.md").write_text("retrained")
    world.settle("2026-11-23T04:00")
    assert [outcome for _, outcome in world.outcomes()] == ["submitted", "unchanged", "submitted"]
    with pytest.raises(NightpressError) as refused:
        world.service.edit(TENANT, "nightly", ScheduleUpdate(source="/etc"))
    assert refused.value.code is ErrorCode.PATH_NOT_ALLOWED


def test_a_source_is_taken_away_by_null_alone(world: World, tmp_path: Path):
    folder = tmp_path / "roots" / "nightly"
    shutil.copytree(world.model, folder)
    world.schedule("2026-11-23T02:00", source=str(folder))
    assert world.service.edit(TENANT, "nightly", ScheduleUpdate(overlap="queue", job=None)).source == str(folder)
    assert world.service.edit(TENANT, "nightly", ScheduleUpdate(source=None)).source is None
    world.settle("2026-11-23T02:00")
    assert world.runs()[0].model_id is None  # no model was fetched for this run


def test_a_source_that_does_not_answer_holds_up_no_other_schedule(world: World):
    down = world.settings.model_copy(update={"hub_endpoint": "http://127.0.0.1:1", "hub_organisations": ["acme"]})
    for part in (world.service, world.firing._bringer, world.models):
        part._settings = down
    world.schedule("2026-11-23T02:00", source="hf://acme/tiny")
    job = JobRequest(model="tiny", recipe="int8-encoder")
    world.service.create(TENANT, ScheduleCreate(name="other", cron="0 * * * *", job=job))
    other = world.service.trigger(TENANT, "other")
    for _ in range(2):
        world.tick("2026-11-23T02:00")
    assert world.schedules.run(other.id).state == "submitted"
    assert world.outcomes() == [("02:00", "pending")]
    with transaction(world.engine) as connection:
        connection.execute(update(schedule_runs).values(created_at=utc("2020-01-01T00:00")))
    world.firing._bringer._rests.clear()
    world.firing.advance()
    assert world.runs()[0].error["code"] == "source_unavailable"
