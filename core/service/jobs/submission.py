"""The submission of jobs: ∅ → queued.

On PostgreSQL, one statement in one round trip checks the quota and inserts the idempotency row, the job and its event.
"""

import datetime as dt
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Engine,
    Insert,
    Integer,
    Row,
    Select,
    bindparam,
    case,
    func,
    insert,
    literal,
    literal_column,
    select,
    true,
)
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.engine import Connection

from nightpress.core.database import (
    JsonType,
    UtcDateTime,
    clean_text,
    db_now,
    lock_until_commit,
    statement,
    transaction,
)
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.ids import new_id
from nightpress.core.service.access.idempotency import mismatch
from nightpress.core.service.access.quotas import NO_BOUND
from nightpress.core.service.jobs.queries import JOB_COLUMNS, QUEUES, job_of
from nightpress.core.service.jobs.records import Idempotency, Job, NewJob
from nightpress.core.service.jobs.states import QUEUED
from nightpress.core.service.tables.jobs import IS_QUEUED, idempotency_keys, job_events, jobs

_GIVEN = (
    "id",
    "tenant_id",
    "name",
    "priority",
    "labels",
    "queue",
    "queue_reason",
    "needs_memory",
    "needs_gpu_memory",
    "needs_gpus",
    "model_id",
    "model_name",
    "model_digest",
    "recipe",
    "data",
    "max_failures",
    "retry_of",
    "promote",
    "created_by",
    "fingerprint",
    "traceparent",
    "study_id",
    "destinations",
    "queue_limit_s",
    "run_limit_s",
    "stall_s",
)
#: After a count that found more than `_NEAR` free places in the quota, a process may write `_ALLOWANCE` submissions of the tenant within
#: `_ALLOWANCE_S` seconds without counting again.
_ALLOWANCE = 64
_ALLOWANCE_S = 2.0
#: With fewer free places, a tenant's submissions take a lock and are counted in turn.
_NEAR = 2048


@dataclass
class _Allowance:
    left: int
    until: float


class _QuotaGauge:
    """Saves most submissions the count of queued jobs, while the tenant is far from its quota.

    A process may have at most `_ALLOWANCE` uncounted submissions left and as many in flight, whatever other processes do. So sixteen
    processes together stay below `_NEAR`. A tenant can exceed its quota only if it submits `_NEAR` jobs within `_ALLOWANCE_S` seconds.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._allowances: dict[str, _Allowance] = {}

    def take(self, tenant_id: str) -> bool:
        """Use up one uncounted submission. False: there is none left, so the caller must count."""
        with self._lock:
            allowance = self._allowances.get(tenant_id)
            if allowance is None or allowance.left <= 0 or time.monotonic() > allowance.until:
                return False
            allowance.left -= 1
            return True

    def is_far(self, tenant_id: str) -> None:
        """Grant a new allowance, after a count that found the tenant far from its quota."""
        with self._lock:
            self._allowances[tenant_id] = _Allowance(_ALLOWANCE, until=time.monotonic() + _ALLOWANCE_S)


class JobSubmission:
    """Writes queued jobs."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._sqlite = engine.dialect.name == "sqlite"
        self._gauge = _QuotaGauge()

    def submit(self, new: NewJob, *, idempotency: Idempotency | None = None, max_queued: int) -> tuple[Job, bool]:
        """Write a queued job. Returns the job, and False if the idempotency key already had a job: then that job is returned.

        Raises NightpressError: quota_exceeded, idempotency_mismatch.
        """
        values = _bound(new, idempotency, max_queued)
        counted = max_queued < NO_BOUND and not self._gauge.take(new.tenant_id)
        write = self._write_on_sqlite if self._sqlite else self._write_on_postgresql
        written = write(values, counted, idempotency)
        if isinstance(written, Job):
            return written, False
        if written is None:
            raise _quota_used_up(max_queued)
        if counted and written.queued < _far_from(max_queued):
            self._gauge.is_far(new.tenant_id)
        return _fresh(values, written.created_at, written.run_after), True

    def _write_on_sqlite(
        self, values: dict[str, Any], counted: bool, idempotency: Idempotency | None
    ) -> Row[Any] | Job | None:
        """Returns the new row, the job that the key already has, or None if the quota is used up."""
        with transaction(self._engine) as connection:
            found = self._found(connection, values["tenant_id"], idempotency) if idempotency else None
            return found or _insert_one_by_one(connection, values, counted, idempotency)

    def _write_on_postgresql(
        self, values: dict[str, Any], counted: bool, idempotency: Idempotency | None
    ) -> Row[Any] | Job | None:
        """Returns the same as on SQLite. Far from the quota this is one statement; near it, submissions wait for a lock."""
        far = _far_from(values["max_queued"]) if counted else values["max_queued"]
        if far:
            with statement(self._engine) as connection:
                written = self._write_all_in_one(connection, {**values, "max_queued": far}, counted, idempotency)
            if written is not None or not counted:
                return written
        with transaction(self._engine) as connection:
            _lock_quota(connection, values["tenant_id"])
            return self._write_all_in_one(connection, values, counted, idempotency)

    def _write_all_in_one(
        self, connection: Connection, values: dict[str, Any], counted: bool, idempotency: Idempotency | None
    ) -> Row[Any] | Job | None:
        row = connection.execute(_all_in_one(counted, idempotency is not None), values).one_or_none()
        if row is None and idempotency is not None:
            return self._found(connection, values["tenant_id"], idempotency)
        return row

    def replay(self, tenant_id: str, idempotency: Idempotency) -> Job | None:
        """The job that an idempotency key already has. Raises NightpressError(idempotency_mismatch)."""
        with transaction(self._engine, read_only=True) as connection:
            return self._found(connection, tenant_id, idempotency)

    def _found(self, connection: Connection, tenant_id: str, idempotency: Idempotency) -> Job | None:
        query = (
            select(idempotency_keys.c.fingerprint, *JOB_COLUMNS)
            .join_from(idempotency_keys, jobs, jobs.c.id == idempotency_keys.c.job_id, isouter=True)
            .where(idempotency_keys.c.tenant_id == tenant_id, idempotency_keys.c.key == idempotency.key)
        )
        row = connection.execute(query).one_or_none()
        if row is None:
            return None
        if row[0] != idempotency.fingerprint or row[1] is None:  # without a job: another kind of request used this key
            raise mismatch()
        return job_of(row[1:])

    def submit_all(self, news: Sequence[NewJob], *, max_queued: int) -> list[Job]:
        """Write queued jobs of one tenant, all or none. Raises NightpressError(quota_exceeded)."""
        with transaction(self._engine) as connection:
            return insert_jobs(connection, news, max_queued=max_queued)


def insert_jobs(connection: Connection, news: Sequence[NewJob], *, max_queued: int) -> list[Job]:
    """Write queued jobs of one tenant as part of the caller's transaction. Raises NightpressError(quota_exceeded)."""
    rows = [_bound(new, None, max_queued) for new in news]
    _lock_quota(connection, news[0].tenant_id)
    queued = connection.execute(_queued_count(), rows[0]).scalar_one()
    if queued + len(rows) > max_queued:
        raise _quota_used_up(max_queued)
    made = [(values, _insert_with_event(connection, values)) for values in rows]
    return [_fresh(values, row.created_at, row.run_after) for values, row in made]


def _far_from(max_queued: int) -> int:
    """The number of queued jobs below which submissions need no lock."""
    return max(0, max_queued - _NEAR)


def _lock_quota(connection: Connection, tenant_id: str) -> None:
    """Lock the tenant's quota until the commit: two counts at the same time would both see the last free place."""
    lock_until_commit(connection, f"quota/{tenant_id}")


def _quota_used_up(max_queued: int) -> NightpressError:
    return NightpressError(
        ErrorCode.QUOTA_EXCEEDED,
        f"There may be {max_queued} jobs queued, and no more.",
        hint="Wait for some to start, or cancel some.",
        limit=max_queued,
    )


def _bound(new: NewJob, idempotency: Idempotency | None, max_queued: int) -> dict[str, Any]:
    values: dict[str, Any] = {name: getattr(new, name) for name in _GIVEN if name != "id"}
    values |= {
        "id": new_id("job"),
        "name": clean_text(new.name),
        "not_before": new.run_after,
        "limit_from_then": None,
        "max_queued": max_queued,
    }
    if new.run_after is not None and new.queue_limit_s is not None:
        values["limit_from_then"] = new.run_after + dt.timedelta(seconds=new.queue_limit_s)
    if idempotency is not None:
        # These names differ from the columns of a job, so that the job's own `fingerprint` is not overwritten.
        values |= {"idempotency_key": idempotency.key, "idempotency_fingerprint": idempotency.fingerprint}
    return values


def _column_values() -> dict[str, ColumnElement[Any]]:
    """The value of each column of a new job. Times come from the database's clock, but for a `run_after` that the caller gave."""
    not_before = bindparam("not_before", type_=UtcDateTime)
    limit = bindparam("queue_limit_s", type_=jobs.c.queue_limit_s.type)
    from_then = bindparam("limit_from_then", type_=UtcDateTime)
    return {
        **{name: bindparam(name, type_=jobs.c[name].type) for name in _GIVEN},
        "state": literal_column(f"'{QUEUED}'"),
        "event_seq": literal_column("1"),
        "created_at": db_now(),
        "run_after": func.coalesce(not_before, db_now(), type_=UtcDateTime),
        "start_before": case((not_before > db_now(), from_then), else_=db_now(limit)),
    }


def _queued_count() -> Select[Any]:
    """The number of a tenant's queued jobs: an index scan that stops at the quota."""
    some = (
        select(literal_column("1"))
        .where(
            IS_QUEUED,
            jobs.c.queue.in_([literal_column(f"'{queue}'") for queue in QUEUES]),
            jobs.c.tenant_id == bindparam("tenant_id", type_=jobs.c.tenant_id.type),
        )
        .limit(bindparam("max_queued", type_=Integer))
        .subquery()
    )
    return select(func.count().label("queued")).select_from(some)


_IDEMPOTENCY_COLUMNS = ("tenant_id", "key", "fingerprint", "job_id", "created_at")


def _idempotency_values() -> list[ColumnElement[Any]]:
    names = {
        "tenant_id": "tenant_id",
        "key": "idempotency_key",
        "fingerprint": "idempotency_fingerprint",
        "job_id": "id",
    }
    bound = [bindparam(param, type_=idempotency_keys.c[column].type) for column, param in names.items()]
    return [*bound, db_now()]


@cache
def _all_in_one(counted: bool, keyed: bool) -> Select[Any]:
    """For PostgreSQL: writes all rows or none. Returns no row if the quota is used up or the key exists.

    A concurrent submission with the same key waits until this transaction commits, and then inserts nothing.
    """
    quota = _queued_count().cte("quota") if counted else select(literal_column("0").label("queued")).cte("quota")
    has_room = quota.c.queued < bindparam("max_queued", type_=Integer)
    values = _column_values()
    row = select(*values.values())
    if keyed:
        claimed = (
            postgresql_insert(idempotency_keys)
            .from_select(_IDEMPOTENCY_COLUMNS, select(*_idempotency_values()).select_from(quota).where(has_room))
            .on_conflict_do_nothing()
            .returning(idempotency_keys.c.job_id)
            .cte("claimed")
        )
        row = row.select_from(claimed)
    else:
        row = row.select_from(quota).where(has_room)
    new = insert(jobs).from_select(list(values), row).returning(jobs.c.created_at, jobs.c.run_after).cte("new")
    event = select(
        bindparam("id", type_=jobs.c.id.type), literal_column("1"), new.c.created_at, literal_column("'queued'"), _EMPTY
    )
    noted = insert(job_events).from_select(["job_id", "seq", "at", "kind", "data"], event).cte("noted")
    return select(new.c.created_at, new.c.run_after, quota.c.queued).join_from(new, quota, true()).add_cte(noted)


def _insert_one_by_one(
    connection: Connection, values: dict[str, Any], counted: bool, idempotency: Idempotency | None
) -> Row[Any] | None:
    """For SQLite: several statements, because the transaction excludes other writers and there is no network round trip."""
    queued = connection.execute(_queued_count(), values).scalar_one() if counted else 0
    if queued >= values["max_queued"]:
        return None
    row = _insert_with_event(connection, {**values, "queued": queued})
    if idempotency is not None:
        key = insert(idempotency_keys).from_select(_IDEMPOTENCY_COLUMNS, select(*_idempotency_values()))
        connection.execute(key, values)
    return row


def _insert_with_event(connection: Connection, values: dict[str, Any]) -> Row[Any]:
    row = connection.execute(_insert_job(), {"queued": 0, **values}).one()
    event = {"job_id": values["id"], "seq": 1, "at": row.created_at, "kind": "queued", "data": {}}
    connection.execute(insert(job_events), event)
    return row


@cache
def _insert_job() -> Insert:
    values = _column_values()
    queued = bindparam("queued", type_=Integer).label("queued")
    return (
        insert(jobs)
        .from_select(list(values), select(*values.values()))
        .returning(jobs.c.created_at, jobs.c.run_after, queued)
    )


_EMPTY = literal({}, JsonType)


def _fresh(values: dict[str, Any], created_at: dt.datetime, run_after: dt.datetime) -> Job:
    """The job that was just written, built from its values instead of reading the row."""
    return Job(
        **{name: values[name] for name in _GIVEN},
        state=QUEUED,
        verdict=None,
        phase=None,
        progress=0.0,
        pass_index=None,
        eta_s=None,
        message="",
        attempt=0,
        failures=0,
        error=None,
        reused_from=None,
        worker_id=None,
        lease_id=None,
        lease_expires_at=None,
        created_at=created_at,
        run_after=run_after,
        started_at=None,
        progressed_at=None,
        finished_at=None,
    )
