"""Every column of every table: written with a value of its own by the code that inserts it, and read back.

Two columns whose values change places, or that share a parameter, show here. So does a new column, or a new table, that nobody added.
"""

import datetime as dt
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import ColumnElement, Engine, Table, select

from core.access.audit import AuditLog
from core.access.idempotency import Answered, Begun, IdempotencyBook
from core.access.issuing import KeyIssuer
from core.access.keys import Principal, create_key
from core.access.quotas import QuotaBook
from core.access.tables import api_keys, audit_log, gpu_usage, tenants
from core.artifacts.storage import open_store
from core.database import clean_text, db_month, make_engine, metadata, read_now, transaction
from core.errors import ErrorCode, NightpressError
from core.handoff.frames import Progress
from core.handoff.manifest import ArtifactEntry, FileEntry, Manifest
from core.jobs.checkpoints import CheckpointIndex, StoredFile
from core.jobs.queries import JOB_COLUMNS
from core.jobs.records import Idempotency, Job, MetricRow, NewJob, Succeeded, Worker, WorkerOffer
from core.jobs.store import JobStore
from core.jobs.tables import (
    checkpoint_files,
    checkpoints,
    idempotency_keys,
    job_artifacts,
    job_attempts,
    job_events,
    job_logs,
    job_metrics,
    job_reports,
    jobs,
    workers,
)
from core.promotions.store import PromotionStore
from core.promotions.tables import promotions
from core.registry.tables import data_sets, models, uploads
from core.schedules.tables import schedule_runs, schedules
from core.schemas import (
    DataSetCreate,
    FileAnnouncement,
    JobCreate,
    JobSpec,
    KeyCreate,
    ModelCreate,
    QuotaChange,
    ScheduleCreate,
    WebhookCreate,
)
from core.settings import Settings
from core.webhooks.signing import SecretKeeper
from core.webhooks.store import WebhookStore
from core.webhooks.tables import webhook_attempts, webhook_deliveries, webhooks
from tests.integration.test_schedules import TENANT, World
from tests.jobs import MODEL_ID, add_model, claim, new_job, submit

Row = Mapping[str, Any]
A_MINUTE = dt.timedelta(minutes=1)


class _Any:
    """Equal to every value that passes a test: for what the code itself chooses."""

    def __init__(self, says: str, is_right: Callable[[Any], bool]) -> None:
        self._says = says
        self._is_right = is_right

    def __eq__(self, other: object) -> bool:
        return self._is_right(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return self._says


def identifier(prefix: str) -> Any:
    return _Any(f"<{prefix}_…>", lambda value: isinstance(value, str) and value.startswith(f"{prefix}_"))


def about(moment: dt.datetime) -> Any:
    return _Any(f"<about {moment}>", lambda value: isinstance(value, dt.datetime) and abs(value - moment) < A_MINUTE)


class Rows:
    """Compares whole rows, and remembers which columns have been seen with a value."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.seen: dict[str, set[str]] = {}
        with transaction(engine, read_only=True) as connection:
            self.now = about(read_now(connection))

    def after(self, seconds: float) -> Any:
        with transaction(self.engine, read_only=True) as connection:
            return about(read_now(connection) + dt.timedelta(seconds=seconds))

    def check(
        self, table: Table, expected: Row, *which: ColumnElement[bool], alike: frozenset[str] = frozenset()
    ) -> Row:
        """The one row of the table that `which` chooses. `alike`: columns that may hold the value of another one."""
        assert set(expected) == set(table.c.keys()), "say here what every column of the table holds"
        plain = [
            value
            for name, value in expected.items()
            if not isinstance(value, _Any | bool) and value not in (None, [], {}) and name not in alike
        ]
        assert all(plain.count(value) == 1 for value in plain), "each column needs a value of its own"
        with transaction(self.engine, read_only=True) as connection:
            row = dict(connection.execute(select(table).where(*which)).mappings().one())
        assert row == expected
        self.seen.setdefault(table.name, set()).update(name for name, value in row.items() if value is not None)
        return row

    def all_seen(self, *tables: Table) -> None:
        for table in tables:
            assert self.seen[table.name] == set(table.c.keys()), f"no row of {table.name} had a value in the others"


@pytest.fixture
def engine(sql_url: str) -> Iterator[Engine]:
    engine = make_engine(sql_url)
    add_model(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def rows(engine: Engine) -> Rows:
    return Rows(engine)


@pytest.fixture
def store(engine: Engine) -> JobStore:
    return JobStore(engine)


# Jobs ----------------------------------------------------------------------------------------------------------------

LATER = dt.datetime(2031, 5, 6, 7, 8, 9, tzinfo=dt.UTC)
#: a value of its own for each field of a new job
GIVEN: dict[str, Any] = {
    "tenant_id": "tenant-a",
    "model_id": MODEL_ID,
    "model_name": "name-of-the-model",
    "model_digest": "sha256:" + "1" * 64,
    "recipe": {"name": "of-the-recipe"},
    "queue": "gpu",
    "needs_memory": 11,
    "run_limit_s": 12.5,
    "stall_s": 13.5,
    "max_failures": 14,
    "name": "name-of-the-job",
    "priority": 15,
    "labels": {"label": "yes"},
    "data": {"reviews": {"id": "dat_1", "name": "reviews", "digest": "sha256:" + "2" * 64}},
    "run_after": LATER,
    "queue_limit_s": 16.5,
    "retry_of": None,
    "promote": False,
    "created_by": "key12345",
    "fingerprint": "3" * 64,
    "traceparent": "00-" + "4" * 32 + "-" + "5" * 16 + "-01",
}
#: what a job has that nobody has taken yet
UNTOUCHED: dict[str, Any] = {
    "state": "queued",
    "verdict": None,
    "phase": None,
    "progress": 0.0,
    "pass_index": None,
    "eta_s": None,
    "message": "",
    "reused_from": None,
    "artifacts_state": "kept",
    "attempt": 0,
    "failures": 0,
    "error": None,
    "error_code": None,
    "worker_id": None,
    "lease_id": None,
    "lease_expires_at": None,
    "started_at": None,
    "progressed_at": None,
    "finished_at": None,
    "event_seq": 1,
    "log_seq": 0,
}
#: may hold what another column holds: small numbers and times
JOB_ALIKE = frozenset({"event_seq", "attempt", "failures", "log_seq", "progress"})


def given(store: JobStore) -> NewJob:
    assert set(GIVEN) == {field.name for field in fields(NewJob)}, "give each field of a new job a value of its own"
    return NewJob(**{**GIVEN, "retry_of": submit(store)})


def queued(new: NewJob, rows: Rows) -> dict[str, Any]:
    values = {field.name: getattr(new, field.name) for field in fields(NewJob)}
    start_before = LATER + dt.timedelta(seconds=GIVEN["queue_limit_s"])
    return {**values, **UNTOUCHED, "id": identifier("job"), "created_at": rows.now, "start_before": start_before}


def submit_plain(store: JobStore, new: NewJob) -> Job:
    return store.submit(new, max_queued=10)[0]


def submit_keyed(store: JobStore, new: NewJob) -> Job:
    return store.submit(new, idempotency=Idempotency("key-of-the-client", "6" * 64), max_queued=10)[0]


def submit_in_a_batch(store: JobStore, new: NewJob) -> Job:
    return store.submit_all([new, new_job(tenant_id=new.tenant_id)], max_queued=10)[0]


@pytest.mark.parametrize("write", [submit_plain, submit_keyed, submit_in_a_batch])
def test_a_new_job(store: JobStore, rows: Rows, write: Callable[[JobStore, NewJob], Job]) -> None:
    new = given(store)
    job = write(store, new)
    row = rows.check(jobs, queued(new, rows), jobs.c.id == job.id, alike=JOB_ALIKE)
    assert job == Job(**{column.name: row[column.name] for column in JOB_COLUMNS}), "the answer is the row"
    assert store.get(new.tenant_id, job.id) == job
    rows.check(
        job_events,
        {"job_id": job.id, "seq": 1, "at": rows.now, "kind": "queued", "data": {}},
        job_events.c.job_id == job.id,
    )


@pytest.mark.parametrize("keyed", [False, True])
def test_an_uncounted_job_is_written_as_a_counted_one(store: JobStore, rows: Rows, keyed: bool) -> None:
    new = replace(given(store), retry_of=None)
    for index in range(3):
        key = Idempotency(f"key-{index}", "6" * 64) if keyed else None
        job, _ = store.submit(new, idempotency=key, max_queued=10_000)
        rows.check(jobs, queued(new, rows), jobs.c.id == job.id, alike=JOB_ALIKE)
