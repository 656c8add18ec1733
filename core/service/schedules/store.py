"""Schedules and their runs in SQL; the only writer of both. core/service/schedules/firing.py decides what a run leads to."""

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Engine, Row, Select, func, insert, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError

from nightpress.core.database import db_now, read_now, transaction
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.ids import new_id
from nightpress.core.paging import newest_first
from nightpress.core.service.schedules.cron import Cron
from nightpress.core.service.tables.jobs import jobs
from nightpress.core.service.tables.schedules import schedule_runs, schedules
from nightpress.core.service.tables.studies import studies
from nightpress.core.service.webhooks.outbox import note_event
from nightpress.core.versions import changed_since
from nightpress.core.wire.jobs import TERMINAL_STATES, JobRequest
from nightpress.core.wire.schedules import ScheduleRunView, ScheduleView
from nightpress.core.wire.studies import StudyRequest

_MAX_SCHEDULES = 1000  #: per tenant
_UPCOMING = 5
_runs = schedule_runs.c


@dataclass(frozen=True)
class DueSchedule:
    """A schedule whose next fire is due."""

    id: str
    name: str
    cron: Cron
    catch_up: str
    next_at: dt.datetime


@dataclass(frozen=True)
class PendingRun:
    """A recorded fire that is not decided yet, with the rules of its schedule."""

    id: str
    schedule_id: str
    schedule_name: str
    tenant_id: str
    scheduled_for: dt.datetime
    created_at: dt.datetime
    cause: str
    overlap: str
    only_if_changed: bool
    job: JobRequest
    study: StudyRequest | None  #: what the fire begins in place of the job
    created_by: str | None
    source: str | None
    model_id: str | None  #: the model that is fetched for the run
    revision: str | None


@dataclass(frozen=True)
class LastRun:
    """The model and the work of the schedule's last job."""

    model_id: str | None  #: None if the schedule has no source
    revision: str | None
    fingerprint: str | None
    study_id: str | None


class ScheduleStore:
    """Schedules of all tenants. Every method that takes a tenant sees only that tenant's schedules."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    # For users ---------------------------------------------------------------------------------------------------

    def create(self, tenant_id: str, values: Mapping[str, Any], *, key_id: str | None) -> ScheduleView:
        """Insert a schedule. `values`: columns of the row. Raises conflict if the name is taken, quota_exceeded."""
        schedule_id = new_id("sch")
        mine = select(func.count()).select_from(schedules).where(schedules.c.tenant_id == tenant_id)
        try:
            with transaction(self._engine) as connection:
                if connection.execute(mine).scalar_one() >= _MAX_SCHEDULES:
                    raise NightpressError(
                        ErrorCode.QUOTA_EXCEEDED,
                        f"There are already {_MAX_SCHEDULES} schedules.",
                        hint="Delete one that is not needed any more.",
                    )
                connection.execute(
                    insert(schedules).values(
                        id=schedule_id,
                        tenant_id=tenant_id,
                        version=1,
                        created_by=key_id,
                        created_at=db_now(),
                        updated_at=db_now(),
                        **values,
                    )
                )
        except IntegrityError as error:
            raise _taken(str(values["name"])) from error
        return self.get(tenant_id, schedule_id)

    def get(self, tenant_id: str, reference: str) -> ScheduleView:
        """The schedule with this id or name. Raises not_found."""
        with transaction(self._engine, read_only=True) as connection:
            row = connection.execute(select(schedules).where(*_named(tenant_id, reference))).one_or_none()
            now = read_now(connection)
        if row is None:
            raise _missing()
        return _view(row, now)

    def page(self, tenant_id: str, *, cursor: str | None, limit: int) -> tuple[list[ScheduleView], str | None]:
        mine = select(schedules).where(schedules.c.tenant_id == tenant_id)
        rows, following = newest_first(
            self._engine, mine, schedules.c.created_at, schedules.c.id, cursor=cursor, limit=limit
        )
        with transaction(self._engine, read_only=True) as connection:
            now = read_now(connection)
        return [_view(row, now) for row in rows], following

    def edit(self, tenant_id: str, schedule: ScheduleView, values: Mapping[str, Any]) -> ScheduleView:
        """Change the schedule. Raises precondition_failed if it has changed since `schedule` was read."""
        unchanged = (*_named(tenant_id, schedule.id), schedules.c.version == schedule.version)
        new = {**values, "version": schedule.version + 1, "updated_at": db_now()}
        try:
            with transaction(self._engine) as connection:
                won = connection.execute(update(schedules).where(*unchanged).values(**new)).rowcount
        except IntegrityError as error:
            if "name" not in values:
                raise
            raise _taken(str(values["name"])) from error
        if not won:
            self.get(tenant_id, schedule.id)
            raise changed_since()
        return self.get(tenant_id, schedule.id)

    def delete(self, tenant_id: str, reference: str, *, version: int | None = None) -> None:
        """Delete the schedule; its jobs stay. Raises precondition_failed if `version` is no longer the schedule's version."""
        found = self.get(tenant_id, reference)
        unchanged = [schedules.c.tenant_id == tenant_id, schedules.c.id == found.id]
        if version is not None:
            unchanged.append(schedules.c.version == version)
        with transaction(self._engine) as connection:
            won = connection.execute(schedules.delete().where(*unchanged)).rowcount
        if not won:
            self.get(tenant_id, found.id)
            raise changed_since()

    def trigger(self, tenant_id: str, schedule_id: str) -> ScheduleRunView:
        """Record a fire now, at a user's request."""
        run_id = new_id("run")
        with transaction(self._engine) as connection:
            if connection.execute(select(1).where(*_named(tenant_id, schedule_id))).one_or_none() is None:
                raise _missing()
            connection.execute(
                insert(schedule_runs).values(
                    id=run_id,
                    schedule_id=schedule_id,
                    scheduled_for=db_now(),
                    created_at=db_now(),
                    cause="manual",
                    state="pending",
                )
            )
        return self.run(run_id)

    def run(self, run_id: str) -> ScheduleRunView:
        with transaction(self._engine, read_only=True) as connection:
            return _run_view(connection.execute(_select_runs().where(_runs.id == run_id)).one())

    def runs(
        self, tenant_id: str, reference: str, *, cursor: str | None, limit: int
    ) -> tuple[list[ScheduleRunView], str | None]:
        """One page of the schedule's runs, newest first, and the cursor of the next."""
        schedule = self.get(tenant_id, reference)
        query = _select_runs().where(_runs.schedule_id == schedule.id)
        rows, following = newest_first(self._engine, query, _runs.created_at, _runs.id, cursor=cursor, limit=limit)
        return [_run_view(row) for row in rows], following

    def now(self) -> dt.datetime:
        with transaction(self._engine, read_only=True) as connection:
            return read_now(connection)

    # For the control process -------------------------------------------------------------------------------------

    def due(self, now: dt.datetime, *, limit: int = 100) -> list[DueSchedule]:
        columns = schedules.c
        query = (
            select(columns.id, columns.name, columns.cron, columns.timezone, columns.catch_up, columns.next_at)
            .where(columns.next_at.is_not(None), columns.next_at <= now)
            .order_by(columns.next_at)
            .limit(limit)
        )
        with transaction(self._engine, read_only=True) as connection:
            rows = connection.execute(query).all()
        return [DueSchedule(row.id, row.name, Cron(row.cron, row.timezone), row.catch_up, row.next_at) for row in rows]

    def record_fires(
        self, due: DueSchedule, fires: Mapping[dt.datetime, str | None], next_at: dt.datetime | None
    ) -> bool:
        """Write a run for each fire, and set the schedule's next fire. False: another replica has already done so.

        `fires`: fire → the reason to skip it, or None to run it.
        """
        still = (schedules.c.id == due.id, schedules.c.next_at == due.next_at)
        with transaction(self._engine) as connection:
            if not connection.execute(update(schedules).where(*still).values(next_at=next_at)).rowcount:
                return False
            for moment, reason in fires.items():
                run_id = new_id("run")
                row = {
                    "id": run_id,
                    "schedule_id": due.id,
                    "scheduled_for": moment,
                    "created_at": db_now(),
                    "cause": "cron",
                    "state": "skipped" if reason else "pending",
                    "reason": reason,
                }
                connection.execute(self._insert_once(connection, row))
                if reason:
                    _note_decided(connection, run_id)
        return True

    def _insert_once(self, connection: Connection, row: Mapping[str, Any]) -> Any:
        if connection.dialect.name == "postgresql":
            return postgresql.insert(schedule_runs).values(**row).on_conflict_do_nothing()
        return sqlite.insert(schedule_runs).values(**row).on_conflict_do_nothing()

    def pending(self, *, limit: int = 100) -> list[PendingRun]:
        """The runs that are not decided yet, oldest first."""
        columns = schedules.c
        query = (
            select(
                _runs.id,
                _runs.schedule_id,
                columns.name.label("schedule_name"),
                columns.tenant_id,
                _runs.scheduled_for,
                _runs.created_at,
                _runs.cause,
                columns.overlap,
                columns.only_if_changed,
                columns.job,
                columns.study,
                columns.created_by,
                columns.source,
                _runs.model_id,
                _runs.revision,
            )
            .join_from(schedule_runs, schedules, columns.id == _runs.schedule_id)
            .where(_runs.state == "pending")
            .order_by(_runs.scheduled_for, _runs.id)
            .limit(limit)
        )
        with transaction(self._engine, read_only=True) as connection:
            rows = connection.execute(query).mappings().all()
        return [
            PendingRun(**{**row, "job": JobRequest.model_validate(row["job"]), "study": _study_of(row["study"])})
            for row in rows
        ]

    def going(self, run: PendingRun) -> list[tuple[str, str | None, str | None]]:
        """Earlier runs of the same schedule that have not ended: (run's id, job's id, study's id)."""
        earlier = or_(
            _runs.scheduled_for < run.scheduled_for, (_runs.scheduled_for == run.scheduled_for) & (_runs.id < run.id)
        )
        is_going = or_(
            _runs.state == "pending",
            (_runs.state == "submitted") & jobs.c.state.not_in(sorted(TERMINAL_STATES)),
            (_runs.state == "submitted") & studies.c.finished_at.is_(None) & studies.c.id.is_not(None),
        )
        query = (
            select(_runs.id, _runs.job_id, _runs.study_id)
            .join_from(schedule_runs, jobs, jobs.c.id == _runs.job_id, isouter=True)
            .join(studies, studies.c.id == _runs.study_id, isouter=True)
            .where(_runs.schedule_id == run.schedule_id, earlier, is_going)
        )
        with transaction(self._engine, read_only=True) as connection:
            return [(row.id, row.job_id, row.study_id) for row in connection.execute(query)]

    def last(self, schedule_id: str) -> LastRun | None:
        """The schedule's last run that submitted something. Runs whose job or study failed or was cancelled are left out."""
        query = (
            select(_runs.model_id, _runs.revision, _runs.fingerprint, _runs.study_id)
            .join_from(schedule_runs, jobs, jobs.c.id == _runs.job_id, isouter=True)
            .join(studies, studies.c.id == _runs.study_id, isouter=True)
            .where(
                _runs.schedule_id == schedule_id,
                _runs.state == "submitted",
                or_(jobs.c.state.is_(None), jobs.c.state.not_in(("failed", "cancelled"))),
                or_(studies.c.state.is_(None), studies.c.state.not_in(("failed", "cancelled"))),
            )
            .order_by(_runs.scheduled_for.desc())
            .limit(1)
        )
        with transaction(self._engine, read_only=True) as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else LastRun(*row)

    def bring(self, run_id: str, model_id: str, revision: str) -> bool:
        """Set the model that a pending run waits for. False: another replica has set it already, or has decided the run."""
        with transaction(self._engine) as connection:
            still = (_runs.id == run_id, _runs.state == "pending", _runs.model_id.is_(None))
            noted = update(schedule_runs).where(*still).values(model_id=model_id, revision=revision)
            return connection.execute(noted).rowcount == 1

    def settle(self, run_id: str, state: str, **columns: Any) -> bool:
        """pending → submitted | skipped | failed. False: another replica has decided the run."""
        with transaction(self._engine) as connection:
            still = (_runs.id == run_id, _runs.state == "pending")
            won = connection.execute(update(schedule_runs).where(*still).values(state=state, **columns)).rowcount == 1
            if won and state in {"failed", "skipped"}:
                _note_decided(connection, run_id)
            return won

    def forget_runs(self, older_than_s: float) -> int:
        """Delete decided runs that are older than `older_than_s` seconds. Returns their number."""
        with transaction(self._engine) as connection:
            old = (_runs.state != "pending", _runs.created_at < db_now(-older_than_s))
            return connection.execute(schedule_runs.delete().where(*old)).rowcount


def _note_decided(connection: Connection, run_id: str) -> None:
    """Tell the tenant's webhooks of a run that failed or was skipped. One whose job or study ends is told by these."""
    query = select(
        schedules.c.id,
        schedules.c.name,
        schedules.c.tenant_id,
        _runs.state,
        _runs.reason,
        _runs.error,
        _runs.scheduled_for,
    ).join_from(schedule_runs, schedules, schedules.c.id == _runs.schedule_id)
    run = connection.execute(query.where(_runs.id == run_id)).one_or_none()
    if run is None:
        return  # another replica has recorded this fire
    told = {"id": run.id, "name": run.name, "run_id": run_id, "scheduled_for": run.scheduled_for.isoformat()}
    told |= {"state": run.state, "reason": run.reason, "error": run.error}
    note_event(connection, run.tenant_id, f"schedule.{run.state}", told)


def _named(tenant_id: str, reference: str) -> tuple[ColumnElement[bool], ...]:
    return (schedules.c.tenant_id == tenant_id, or_(schedules.c.id == reference, schedules.c.name == reference))


def _select_runs() -> Select[Any]:
    columns = (
        jobs.c.state.label("job_state"),
        jobs.c.verdict.label("job_verdict"),
        studies.c.state.label("study_state"),
        studies.c.verdict.label("study_verdict"),
    )
    return (
        select(schedule_runs, *columns)
        .join_from(schedule_runs, jobs, jobs.c.id == _runs.job_id, isouter=True)
        .join(studies, studies.c.id == _runs.study_id, isouter=True)
    )


def _study_of(raw: Mapping[str, Any] | None) -> StudyRequest | None:
    return None if raw is None else StudyRequest.model_validate(raw)


def _view(row: Row[Any], now: dt.datetime) -> ScheduleView:
    values = dict(row._mapping)
    upcoming: list[dt.datetime] = []
    if row.next_at is not None:
        upcoming = [row.next_at] if row.next_at > now else []
        for fire in Cron(row.cron, row.timezone).after(max(row.next_at, now)):
            if len(upcoming) >= _UPCOMING:
                break
            upcoming.append(fire)
    read = {"job": JobRequest.model_validate(row.job), "study": _study_of(row.study)}
    return ScheduleView(**{**values, **read}, upcoming=upcoming)


def _run_view(row: Row[Any]) -> ScheduleRunView:
    return ScheduleRunView(**row._mapping)


def _taken(name: str) -> NightpressError:
    return NightpressError(
        ErrorCode.CONFLICT, f"There is already a schedule {name!r}.", hint="Edit that one, or choose another name."
    )


def _missing() -> NightpressError:
    return NightpressError(ErrorCode.NOT_FOUND, "There is no such schedule.", hint="GET /v1/schedules lists yours.")
