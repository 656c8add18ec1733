"""Removes old jobs and their artifacts in small batches: they are hidden first, then their files are deleted, then their rows.

This order is safe: artifacts that a reader can see have their files, and if a process is killed halfway, the rows are still there for
the next try. Some artifacts are kept whatever their age: those that are promoted, those of a schedule's last job, those of a
study's winner, those that another job reuses, and those that are being delivered.
"""

from sqlalchemy import ColumnElement, Engine, and_, delete, exists, or_, select, tuple_, update
from sqlalchemy.engine import Connection

from nightpress.core.artifacts.storage import ObjectStore
from nightpress.core.database import db_now, transaction
from nightpress.core.service.tables.deliveries import IS_PENDING, deliveries
from nightpress.core.service.tables.jobs import job_artifacts, jobs
from nightpress.core.service.tables.promotions import promotions
from nightpress.core.service.tables.schedules import schedule_runs
from nightpress.core.service.tables.studies import studies, study_trials
from nightpress.core.wire.jobs import TERMINAL_STATES

_BATCH = 100
_columns = jobs.c


class JobRetention:
    """Deletes old jobs and artifacts. Every step may run twice, and in several processes at the same time."""

    def __init__(self, engine: Engine, objects: ObjectStore) -> None:
        self._engine = engine
        self._objects = objects

    def prune_artifacts(self, older_than_s: float) -> int:
        """Delete the artifacts of jobs that ended more than `older_than_s` seconds ago. Reports stay. Returns the number of jobs."""
        mine = exists().where(job_artifacts.c.job_id == _columns.id)
        old = (_columns.finished_at < db_now(-older_than_s), _columns.artifacts_state == "kept", mine)
        for job_id in self._find(*old):
            self._hide(job_id)
        going = self._find(_columns.artifacts_state == "going")
        for job_id in going:
            self._remove_files(job_id)
        return len(going)

    def prune_jobs(self, older_than_s: float) -> int:
        """Delete jobs that ended more than `older_than_s` seconds ago, with all that belongs to them. Returns their number."""
        self.prune_artifacts(older_than_s)
        bare = ~exists().where(job_artifacts.c.job_id == _columns.id)
        found = self._find(_columns.finished_at < db_now(-older_than_s), bare)
        return sum(self._delete(job_id) for job_id in found)

    def _find(self, *conditions: ColumnElement[bool]) -> list[str]:
        query = select(_columns.id).where(_columns.finished_at.is_not(None), *conditions, ~_is_kept())
        with transaction(self._engine, read_only=True) as connection:
            return list(connection.scalars(query.order_by(_columns.finished_at).limit(_BATCH)))

    def _hide(self, job_id: str) -> None:
        """kept → going. From now on, no identical job reuses the result, and it can't be promoted."""
        with transaction(self._engine) as connection:
            if _still_unneeded(connection, job_id):
                hidden = {"artifacts_state": "going", "fingerprint": None}
                connection.execute(update(jobs).where(_columns.id == job_id).values(**hidden))

    def _remove_files(self, job_id: str) -> None:
        """going → gone."""
        query = select(_columns.reused_from, job_artifacts.c.attempt, job_artifacts.c.path)
        query = query.join_from(job_artifacts, jobs, _columns.id == job_artifacts.c.job_id).where(_columns.id == job_id)
        with transaction(self._engine, read_only=True) as connection:
            rows = connection.execute(query).all()
        for row in rows:
            if row.reused_from is None:  # otherwise the files belong to another job
                self._objects.delete_prefix(f"jobs/{job_id}/attempts/{row.attempt}/{row.path}")
        with transaction(self._engine) as connection:
            connection.execute(delete(job_artifacts).where(job_artifacts.c.job_id == job_id))
            connection.execute(update(jobs).where(_columns.id == job_id).values(artifacts_state="gone"))

    def _delete(self, job_id: str) -> bool:
        self._objects.delete_prefix(f"jobs/{job_id}")  # the report's files, and files that attempts left behind
        with transaction(self._engine) as connection:
            if not _still_unneeded(connection, job_id):
                return False
            connection.execute(delete(jobs).where(_columns.id == job_id))
        return True


def _still_unneeded(connection: Connection, job_id: str) -> bool:
    """Check again, with a lock on the job's row. Promotions and reuse take the same lock."""
    locked = connection.execute(select(_columns.id).where(_columns.id == job_id).with_for_update()).one_or_none()
    wanted = select(_columns.id).where(_columns.id == job_id, _columns.state.in_(sorted(TERMINAL_STATES)), ~_is_kept())
    return locked is not None and connection.execute(wanted).one_or_none() is not None


def _is_kept() -> ColumnElement[bool]:
    newer = promotions.alias("newer")
    moved_on = exists().where(
        newer.c.tenant_id == promotions.c.tenant_id,
        newer.c.model_name == promotions.c.model_name,
        tuple_(newer.c.created_at, newer.c.id) > tuple_(promotions.c.created_at, promotions.c.id),
    )
    promoted = exists().where(promotions.c.job_id == _columns.id, ~moved_on)
    later = schedule_runs.alias("later")
    followed = exists().where(
        later.c.schedule_id == schedule_runs.c.schedule_id,
        later.c.scheduled_for > schedule_runs.c.scheduled_for,
        later.c.state == "submitted",
        later.c.job_id.is_not(None),
    )
    scheduled = exists().where(schedule_runs.c.job_id == _columns.id, schedule_runs.c.state == "submitted", ~followed)
    won = exists().where(
        study_trials.c.job_id == _columns.id,
        studies.c.id == study_trials.c.study_id,
        studies.c.winner == study_trials.c.number,
    )
    given = jobs.alias("given")
    reused = exists().where(
        given.c.reused_from == _columns.id,
        and_(given.c.reused_from.is_not(None), or_(given.c.artifacts_state == "kept", given.c.finished_at.is_(None))),
    )
    leaving = exists().where(deliveries.c.job_id == _columns.id, IS_PENDING)
    return or_(promoted, scheduled, won, reused, leaving)
