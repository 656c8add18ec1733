"""Reading jobs: nothing here changes a row."""

import datetime as dt
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, get_args

from sqlalchemy import ColumnElement, Engine, Select, case, func, literal_column, or_, select
from sqlalchemy.dialects.postgresql import JSONB

from nightpress.core.database import db_now, transaction
from nightpress.core.paging import newest_first
from nightpress.core.recipes.placement import Queue
from nightpress.core.service.jobs.records import Artifact, Event, Job, JobStatistics, LogLine, QueueLoad
from nightpress.core.service.jobs.states import QUEUED
from nightpress.core.service.tables.jobs import (
    IS_LEASED,
    IS_QUEUED,
    job_artifacts,
    job_attempts,
    job_events,
    job_logs,
    job_reports,
    jobs,
)
from nightpress.core.wire.jobs import JobState

JOB_COLUMNS = tuple(jobs.c[field.name] for field in fields(Job))
_COUNT_BOUND = 1000
QUEUES: tuple[Queue, ...] = get_args(Queue)


def job_of(row: Sequence[Any]) -> Job:
    """The job of a row that was selected with JOB_COLUMNS."""
    return Job(*row)


@dataclass(frozen=True)
class JobsWanted:
    """A filter for a tenant's jobs. A job must match all given fields."""

    states: Collection[JobState] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    model: str | None = None  #: an id or a name
    queue: Queue | None = None
    created_after: dt.datetime | None = None  #: this moment included
    created_before: dt.datetime | None = None


class JobReader:
    """Reads jobs. Nothing here changes a row."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._sqlite = engine.dialect.name == "sqlite"

    def get(self, tenant_id: str, job_id: str) -> Job | None:
        """None if there is no such job, or it belongs to another tenant."""
        query = select(*JOB_COLUMNS).where(jobs.c.id == job_id, jobs.c.tenant_id == tenant_id)
        with transaction(self._engine, read_only=True) as connection:
            row = connection.execute(query).one_or_none()
        return job_of(row) if row else None

    def page(
        self, tenant_id: str, wanted: "JobsWanted | None" = None, *, cursor: str | None = None, limit: int = 50
    ) -> tuple[list[Job], str | None]:
        """A tenant's jobs, newest first, and the cursor of the next page.

        Raises NightpressError(invalid_request) for a cursor that this service did not make.
        """
        query = select(*JOB_COLUMNS).where(*self.matching(tenant_id, wanted or JobsWanted()))
        rows, following = newest_first(self._engine, query, jobs.c.created_at, jobs.c.id, cursor=cursor, limit=limit)
        return [job_of(row) for row in rows], following

    def matching(self, tenant_id: str, wanted: "JobsWanted") -> list[ColumnElement[bool]]:
        found = [jobs.c.tenant_id == tenant_id, *(self._has_label(key, value) for key, value in wanted.labels.items())]
        if wanted.states:
            found.append(jobs.c.state.in_(wanted.states))
        if wanted.model is not None:
            found.append(or_(jobs.c.model_id == wanted.model, jobs.c.model_name == wanted.model))
        if wanted.queue is not None:
            found.append(jobs.c.queue == wanted.queue)
        if wanted.created_after is not None:
            found.append(jobs.c.created_at >= wanted.created_after)
        if wanted.created_before is not None:
            found.append(jobs.c.created_at < wanted.created_before)
        return found

    def _has_label(self, key: str, value: str) -> ColumnElement[bool]:
        if not self._sqlite:
            return jobs.c.labels.cast(JSONB).contains({key: value})
        each = func.json_each(jobs.c.labels).table_valued("key", "value", name="label")
        return select(1).select_from(each).where(each.c.key == key, each.c.value == value).exists()

    def events(self, job_id: str, *, after: int = 0, limit: int = 500) -> list[Event]:
        """The events with numbers above `after`, in order."""
        columns = job_events.c
        query = select(columns.seq, columns.at, columns.kind, columns.data)
        query = query.where(columns.job_id == job_id, columns.seq > after).order_by(columns.seq).limit(limit)
        with transaction(self._engine, read_only=True) as connection:
            return [Event(*row) for row in connection.execute(query)]

    def logs(self, job_id: str, *, after: int = 0, limit: int = 500) -> list[LogLine]:
        """The log lines of all attempts with numbers above `after`, in order."""
        columns = job_logs.c
        query = select(columns.seq, columns.at, columns.attempt, columns.level, columns.text)
        query = query.where(columns.job_id == job_id, columns.seq > after).order_by(columns.seq).limit(limit)
        with transaction(self._engine, read_only=True) as connection:
            return [LogLine(*row) for row in connection.execute(query)]

    def artifacts(self, job_id: str) -> list[Artifact]:
        """The artifacts that the job committed. Empty before it has succeeded and after its artifacts were pruned."""
        query = select(*(job_artifacts.c[field.name] for field in fields(Artifact)))
        query = query.join_from(job_artifacts, jobs, jobs.c.id == job_artifacts.c.job_id)
        query = query.where(jobs.c.id == job_id, jobs.c.artifacts_state == "kept").order_by(job_artifacts.c.path)
        with transaction(self._engine, read_only=True) as connection:
            return [Artifact(*row) for row in connection.execute(query)]

    def report(self, job_id: str) -> dict[str, Any] | None:
        """report.json of a job that has succeeded."""
        query = select(job_reports.c.report).where(job_reports.c.job_id == job_id)
        with transaction(self._engine, read_only=True) as connection:
            return connection.execute(query).scalar_one_or_none()

    def machine_faults(self, job_id: str) -> int:
        """The number of attempts of a job that a fault of the worker's machine ended. They are not counted as failures."""
        ended_so = (job_attempts.c.outcome == literal_column("'released'"), job_attempts.c.error.is_not(None))
        query = select(func.count()).where(job_attempts.c.job_id == job_id, *ended_so)
        with transaction(self._engine, read_only=True) as connection:
            return int(connection.execute(query).scalar_one())

    def queues_with_work(self) -> dict[str, int]:
        """Queue → number of jobs that could run now. Counting stops at 1000; queues without such jobs are left out."""
        counts = (
            select(
                func.count(),
            ).select_from(
                select(literal_column("1"))
                .where(IS_QUEUED, jobs.c.queue == literal_column(f"'{queue}'"), jobs.c.run_after <= db_now())
                .limit(_COUNT_BOUND)
                .subquery()
            )
            for queue in QUEUES
        )
        with transaction(self._engine, read_only=True) as connection:
            row = connection.execute(select(*(count.scalar_subquery() for count in counts))).one()
        return {queue: count for queue, count in zip(QUEUES, row, strict=True) if count}

    def abandoned_attempts(self, *, older_than_s: float = 3600.0, limit: int = 100) -> list[tuple[str, int]]:
        """Attempts (job, number) that ended without a result more than `older_than_s` seconds ago.

        No process writes their files any more, so these may be deleted.
        """
        columns = job_attempts.c
        query = select(columns.job_id, columns.number).where(
            literal_column("outcome <> 'succeeded' AND NOT swept"), columns.finished_at < db_now(-older_than_s)
        )
        with transaction(self._engine, read_only=True) as connection:
            return [(job_id, number) for job_id, number in connection.execute(query.limit(limit))]

    def queues(self) -> list[QueueLoad]:
        """The number of queued and running jobs of each queue. Reads only partial indexes."""
        leased = select(jobs.c.queue, func.count(), func.sum(jobs.c.needs_gpus)).where(IS_LEASED).group_by(jobs.c.queue)
        with transaction(self._engine, read_only=True) as connection:
            waiting = {queue: rest for queue, *rest in connection.execute(_waiting())}
            running = {queue: rest for queue, *rest in connection.execute(leased)}
        loads = []
        for queue in QUEUES:
            count, gpus, oldest, at = waiting.get(queue, (0, 0, None, None))
            busy, busy_gpus = running.get(queue, (0, 0))
            held = {"queued_gpus": int(gpus), "running_gpus": int(busy_gpus)} if queue == "gpu" else {}
            loads.append(QueueLoad(queue, count, busy, _age_s(oldest, at), **held))
        return loads

    def statistics(self) -> JobStatistics:
        """Counts over all jobs. Reads only partial indexes."""
        leased = (
            select(jobs.c.queue, jobs.c.state, func.count(), func.sum(jobs.c.needs_gpus))
            .where(IS_LEASED)
            .group_by(jobs.c.queue, jobs.c.state)
        )
        done = (
            select(jobs.c.queue, jobs.c.state, jobs.c.error_code, func.count())
            .where(jobs.c.finished_at.is_not(None))
            .group_by(jobs.c.queue, jobs.c.state, jobs.c.error_code)
        )
        counts: dict[tuple[Queue, JobState], int] = {}
        ages: dict[Queue, float] = {}
        failures: dict[str, int] = {}
        gpus: dict[JobState, int] = {}
        with transaction(self._engine, read_only=True) as connection:
            for queue, count, needed, oldest, at in connection.execute(_waiting()):
                counts[queue, QUEUED] = count
                if queue == "gpu":
                    gpus[QUEUED] = int(needed)
                if (age := _age_s(oldest, at)) is not None:
                    ages[queue] = age
            for queue, state, count, needed in connection.execute(leased):
                counts[queue, state] = count
                if queue == "gpu":
                    gpus[state] = int(needed)
            for queue, state, code, count in connection.execute(done):
                counts[queue, state] = counts.get((queue, state), 0) + count
                if code is not None:
                    failures[code] = failures.get(code, 0) + count
        return JobStatistics(jobs=counts, oldest_queued_s=ages, failures=failures, gpus=gpus)


def _waiting() -> Select[Any]:
    """Of each queue: the number of queued jobs and of the GPUs that they need, when the oldest that could run was made, and the time now."""
    now = db_now()
    oldest = func.min(case((jobs.c.run_after <= now, jobs.c.created_at)))
    columns = (jobs.c.queue, func.count(), func.sum(jobs.c.needs_gpus), oldest, now)
    return select(*columns).where(IS_QUEUED).group_by(jobs.c.queue)


def _age_s(made_at: dt.datetime | None, now: dt.datetime | None) -> float | None:
    return None if made_at is None or now is None else max(0.0, (now - made_at).total_seconds())
