"""What retention deletes, what it keeps at any age, and that files and rows are deleted together: on both kinds of database."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, insert, select, update
from sqlalchemy.exc import DatabaseError

from nightpress.core.artifacts.local import LocalStore
from nightpress.core.database import db_now, make_engine, transaction
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.ids import new_id
from nightpress.core.service.access.audit import AuditLog
from nightpress.core.service.jobs.records import Idempotency
from nightpress.core.service.jobs.retention import JobRetention
from nightpress.core.service.jobs.store import JobStore
from nightpress.core.service.promotions.store import PromotionStore
from nightpress.core.service.registry.models import ModelRegistry
from nightpress.core.service.tables.access import audit_log
from nightpress.core.service.tables.jobs import job_artifacts, job_attempts, job_events, jobs
from nightpress.core.service.tables.registry import models
from nightpress.core.service.tables.schedules import schedule_runs, schedules
from nightpress.core.settings import Settings
from tests.jobs import add_model, age, claim, new_job, submit, succeeded

DAY = 24 * 3600.0


class World:
    def __init__(self, folder: Path, sql_url: str) -> None:
        self.engine: Engine = make_engine(sql_url)
        self.store = JobStore(self.engine)
        self.objects = LocalStore(folder)
        self.retention = JobRetention(self.engine, self.objects)
        add_model(self.engine)

    def done(self, *, days: float, **changes: object) -> str:
        """A job that ended this number of days ago, with a model and a report in storage. Returns its id."""
        job_id = submit(self.store, **changes)
        claimed = claim(self.store)
        for path in ("safetensors/model.safetensors", "report.html", "manifest.json"):
            self.objects.put_bytes(f"jobs/{job_id}/attempts/{claimed.lease.attempt}/{path}", b"xyz")
        assert self.store.attempts.finish(claimed.lease, succeeded(claimed.lease))
        age(self.engine, job_id, days * DAY, "finished_at")
        return job_id

    def files(self, job_id: str) -> set[str]:
        return {info.key.split("/", 4)[4] for info in self.objects.list(f"jobs/{job_id}")}

    def has_artifacts(self, job_id: str) -> bool:
        return bool(self.store.reader.artifacts(job_id)) and "safetensors/model.safetensors" in self.files(job_id)

    def schedule(self, job_id: str) -> None:
        with transaction(self.engine) as connection:
            row = {"id": new_id("sch"), "tenant_id": "default", "name": new_id("s"), "cron": "0 2 * * *"}
            rules = {"timezone": "UTC", "overlap": "skip", "catch_up": "latest", "only_if_changed": False}
            more = {"suspended": True, "job": {}, "version": 1, "created_at": db_now(), "updated_at": db_now()}
            connection.execute(insert(schedules).values(**row, **rules, **more))
            run = {"id": new_id("run"), "schedule_id": row["id"], "cause": "cron", "state": "submitted"}
            connection.execute(
                insert(schedule_runs).values(**run, job_id=job_id, scheduled_for=db_now(), created_at=db_now())
            )


@pytest.fixture
def world(tmp_path: Path, sql_url: str) -> Iterator[World]:
    world = World(tmp_path / "objects", sql_url)
    yield world
    world.engine.dispose()


@pytest.mark.slow
def test_old_artifacts_go_with_their_files_and_reports_stay(world: World):
    old = world.done(days=40)
    older_name = world.done(days=40, model_name="other")
    young = world.done(days=20)  # the newest of its model name, which points to it
    assert world.retention.prune_artifacts(30 * DAY) == 1
    assert not world.has_artifacts(old)
    assert world.files(old) == {"report.html", "manifest.json"}
    assert world.store.reader.report(old) is not None
    assert world.has_artifacts(young)
    assert world.has_artifacts(older_name), "the latest of a model's name stays"
    assert world.retention.prune_artifacts(30 * DAY) == 0
    with pytest.raises(NightpressError) as refused:
        PromotionStore(world.engine).promote("default", "tiny", old, key_id=None)
    assert refused.value.code is ErrorCode.CONFLICT


def test_going_back_to_an_old_result_keeps_it(world: World):
    old, newer = world.done(days=40), world.done(days=39)
    PromotionStore(world.engine).promote("default", "tiny", old, key_id=None)
    assert world.retention.prune_artifacts(30 * DAY) == 1
    assert world.has_artifacts(old)
    assert not world.has_artifacts(newer)


def test_what_a_schedule_made_last_stays(world: World):
    old = world.done(days=40, promote=False)
    scheduled = world.done(days=40, promote=False)
    world.schedule(scheduled)
    world.retention.prune_jobs(30 * DAY)
    assert world.store.reader.get("default", old) is None
    assert world.has_artifacts(scheduled)


def test_a_result_stays_as_long_as_a_job_that_was_given_it(world: World):
    origin = world.done(days=40, promote=False, fingerprint="f" * 64)
    job, _ = world.store.submission.submit(new_job(promote=False, fingerprint="f" * 64), max_queued=10)
    given = world.store.requests.reuse(job)
    assert given.reused_from == origin
    assert world.retention.prune_artifacts(30 * DAY) == 0
    age(world.engine, given.id, 35 * DAY, "finished_at")
    world.retention.prune_artifacts(30 * DAY)
    world.retention.prune_artifacts(30 * DAY)
    assert not world.store.reader.artifacts(given.id)
    assert not world.has_artifacts(origin)
    again, _ = world.store.submission.submit(new_job(promote=False, fingerprint="f" * 64), max_queued=10)
    assert world.store.requests.reuse(again).state == "queued", "what is gone is given to nobody"


def test_a_job_goes_whole_and_one_that_is_not_over_never(world: World):
    old, running = world.done(days=400, promote=False), submit(world.store)
    key = Idempotency("nightly", "body")
    keyed, _ = world.store.submission.submit(new_job(), idempotency=key, max_queued=10)
    world.store.requests.request_cancel("default", keyed.id)
    age(world.engine, keyed.id, 400 * DAY, "finished_at")
    claim(world.store)
    assert world.retention.prune_jobs(365 * DAY) == 2
    assert world.store.reader.get("default", old) is None
    assert world.files(old) == set()
    assert world.store.reader.get("default", running) is not None
    assert world.store.submission.replay("default", key) is None
    with transaction(world.engine, read_only=True) as connection:
        for table in (job_events, job_attempts):
            assert set(connection.scalars(select(table.c.job_id))) == {running}


@pytest.mark.slow
def test_a_process_killed_half_way_leaves_nothing_that_is_not_found_again(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    old = world.done(days=40, promote=False)
    delete_prefix = world.objects.delete_prefix

    def killed(prefix: str) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(world.objects, "delete_prefix", killed)
    with pytest.raises(KeyboardInterrupt):
        world.retention.prune_artifacts(30 * DAY)
    assert world.store.reader.artifacts(old) == [], "nobody is shown what is going"
    assert "safetensors/model.safetensors" in world.files(old)
    monkeypatch.setattr(world.objects, "delete_prefix", delete_prefix)
    assert world.retention.prune_artifacts(30 * DAY) == 1
    assert world.files(old) == {"report.html", "manifest.json"}
    with transaction(world.engine, read_only=True) as connection:
        assert list(connection.scalars(select(job_artifacts.c.job_id))) == []
        assert connection.execute(select(jobs.c.artifacts_state)).scalar_one() == "gone"


def test_fetched_models_that_a_newer_one_supersedes_go_but_for_what_a_job_needs(world: World, tmp_path: Path):
    registry = ModelRegistry(world.engine, world.objects, Settings(_env_file=None, data_dir=tmp_path))
    fetched = {"source": "s3", "source_url": "s3://b/m", "tenant_id": "default", "name": "nightly", "files": []}
    ready = {"state": "ready", "digest": "d", "parameters": 1, "size": 3}
    with transaction(world.engine) as connection:
        for name in ("mdl_1", "mdl_2", "mdl_3"):
            row = {"id": name, "created_at": db_now(-40 * DAY), **fetched, **ready}
            connection.execute(insert(models).values(row))
            world.objects.put_bytes(f"models/{name}/config.json", b"{}")
    submit(world.store, model_id="mdl_2")
    assert registry.forget_superseded(50 * DAY) == 0
    assert registry.forget_superseded(30 * DAY) == 1
    assert {info.key.split("/")[1] for info in world.objects.list("models")} == {"mdl_2", "mdl_3"}
    assert {model.id for model in registry.page("default")[0]} >= {"mdl_2", "mdl_3"}


def test_the_audit_log_loses_old_lines_alone(world: World):
    audit = AuditLog(world.engine)
    for days in (0, 29, 40, 400):
        row = {"tenant_id": "a", "key_id": "k", "action": "POST /x", "subject": "/x", "status": 201, "request_id": "r"}
        with transaction(world.engine) as connection:
            connection.execute(insert(audit_log).values(id=new_id("aud"), at=db_now(-days * DAY), **row))
    assert audit.prune(365 * DAY) == 1
    assert audit.prune(0.0) == 1, "never before thirty days"
    for change in (audit_log.delete(), update(audit_log).values(status=200)):
        with pytest.raises(DatabaseError), transaction(world.engine) as connection:
            connection.execute(change)
    assert len(audit.page(tenant_id="a", cursor=None, limit=10)[0]) == 2
