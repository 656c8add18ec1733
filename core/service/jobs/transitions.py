"""The statements of a job's transitions: one guarded UPDATE and the insert of its event, in one transaction."""

import random
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Engine,
    bindparam,
    case,
    insert,
    literal_column,
    null,
    update,
)
from sqlalchemy.engine import Connection

from nightpress.core.database import JsonType, db_now, transaction
from nightpress.core.errors import NightpressError
from nightpress.core.service.access.quotas import add_gpu_time
from nightpress.core.service.jobs.queries import JOB_COLUMNS, job_of
from nightpress.core.service.jobs.records import Job, Lease
from nightpress.core.service.jobs.states import (
    CANCELLED,
    CANCELLING,
    FAILED,
    QUEUED,
    AttemptOutcome,
    Trigger,
    sources,
)
from nightpress.core.service.tables.jobs import (
    IS_QUEUED,
    job_attempts,
    job_events,
    jobs,
)
from nightpress.core.service.trackers.outbox import note_for_trackers
from nightpress.core.service.webhooks.outbox import note_for_webhooks

MAX_BACKOFF_S = 600.0

_columns = jobs.c

#: values of the columns that are empty while no worker has the job
RESTING: dict[str, Any] = {
    "lease_id": null(),
    "lease_expires_at": null(),
    "phase": null(),
    "pass_index": null(),
    "eta_s": null(),
}


def move(
    connection: Connection,
    trigger: Trigger,
    *guards: ColumnElement[bool],
    note: Callable[[Job], tuple[str, dict[str, Any]]],
    **values: Any,
) -> Job | None:
    """Update the job that meets the guards, if the trigger has an effect in its state, and insert an event.

    `note`: returns the kind and data of the event, from the updated job. Returns None if there is no such job; then nothing is written.
    The same UPDATE increases the event's number, so that numbers have no gaps.
    """
    in_source = IS_QUEUED if sources(trigger) == (QUEUED,) else _columns.state.in_(sources(trigger))
    guarded = (
        update(jobs)
        .where(*guards, in_source)
        .values(event_seq=_columns.event_seq + 1, **values)
        .returning(*JOB_COLUMNS, _columns.event_seq)
    )
    row = connection.execute(guarded).one_or_none()
    if row is None:
        return None
    job, seq = job_of(row[:-1]), row[-1]
    kind, data = note(job)
    event = {"job_id": job.id, "seq": seq, "kind": kind, "data": data}
    connection.execute(insert(job_events).values(at=db_now(), **event))
    note_for_webhooks(connection, job.tenant_id, kind, job.told())
    note_for_trackers(connection, job.id)
    return job


def end_badly(
    engine: Engine,
    trigger: Trigger,
    guards: Sequence[ColumnElement[bool]],
    error: NightpressError,
    *,
    backoff_s: float,
    outcome: AttemptOutcome,
    when_cancelling: str,
) -> Job | None:
    """running → queued | failed, cancelling → `when_cancelling`. Depends on the error and on the failures so far."""
    fault = error.as_dict()
    used_up = _columns.failures + 1 >= _columns.max_failures if error.kind.retryable else literal_column("1 = 1")

    def note(job: Job) -> tuple[str, dict[str, Any]]:
        data: dict[str, Any] = {"attempt": job.attempt, "error": fault}
        if job.state != QUEUED:
            return job.state, data
        return "requeued", data | {"failures": job.failures, "run_after": job.run_after.isoformat()}

    state = case((_columns.state == CANCELLING, when_cancelling), (used_up, FAILED), else_=QUEUED)
    with transaction(engine) as connection:
        job = move(
            connection,
            trigger,
            *guards,
            note=note,
            state=state,
            failures=case((state == CANCELLED, _columns.failures), else_=_columns.failures + 1),
            error=case((state == FAILED, bindparam("fault", fault, type_=JsonType)), else_=null()),
            error_code=case((state == FAILED, error.code.value), else_=null()),
            run_after=case((state == QUEUED, _backed_off(backoff_s)), else_=_columns.run_after),
            finished_at=case((state == QUEUED, null()), else_=db_now()),
            **RESTING,
        )
        if job is None:
            return None
        close_attempt(connection, job, outcome, fault)
    return job


def holds(lease: Lease, trigger: Trigger) -> list[ColumnElement[bool]]:
    return [_columns.id == lease.job_id, _columns.lease_id == lease.lease_id, _columns.state.in_(sources(trigger))]


def _backed_off(backoff_s: float) -> db_now:
    """Now plus min(backoff · 2^failures, MAX_BACKOFF_S), times a random factor of 0.5 to 1."""
    jitter = random.uniform(0.5, 1.0)
    doubled = backoff_s * jitter * literal_column("1").op("<<")(_columns.failures)
    bound = MAX_BACKOFF_S * jitter
    return db_now(case((doubled < bound, doubled), else_=bound))


def close_attempt(
    connection: Connection, job: Job, outcome: AttemptOutcome, error: dict[str, Any] | None = None
) -> None:
    connection.execute(
        update(job_attempts)
        .where(job_attempts.c.job_id == job.id, job_attempts.c.number == job.attempt)
        .values(finished_at=db_now(), outcome=outcome, error=error)
    )
    if job.queue == "gpu":
        add_gpu_time(connection, job.tenant_id, job.started_at, job.gpus)
