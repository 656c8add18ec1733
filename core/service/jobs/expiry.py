"""Ends runs whose worker is lost, and jobs that waited too long. Called by the control process."""

from sqlalchemy import (
    ColumnElement,
    Engine,
    null,
    select,
    update,
)

from nightpress.core.database import db_now, statement, transaction
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.service.jobs.states import (
    CANCELLED,
    FAILED,
    Trigger,
)
from nightpress.core.service.jobs.transitions import end_badly, move
from nightpress.core.service.tables.jobs import (
    IS_LEASED,
    job_attempts,
    jobs,
)

#: Seconds after a deadline before the control process ends a run that its supervisor should have stopped.
SUPERVISOR_GRACE_S = 60.0
_EXPIRE_BATCH = 200

_columns = jobs.c


class JobExpiry:
    """Ends jobs that are past a deadline or whose worker is lost."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def expire_leases(self, *, backoff_s: float) -> list[str]:
        """End attempts whose worker is lost, or did not stop a run that stalled or passed its limit. Returns the jobs' ids."""
        lost = NightpressError(
            ErrorCode.WORKER_LOST,
            "The worker stopped renewing its lease.",
            hint="Look at the worker's log: it was killed, or cut off from the database.",
        )
        stalled = NightpressError(
            ErrorCode.STALLED,
            "The job made no progress, and its worker did not stop it.",
            hint="Raise stall_s, or look at the job's log.",
        )
        too_long = NightpressError(
            ErrorCode.DEADLINE_EXCEEDED,
            "The job ran past its limit, and its worker did not stop it.",
            hint="Raise run_limit_s, or use a faster recipe.",
        )
        taken = self._end_all(Trigger.LEASE_EXPIRED, _columns.lease_expires_at < db_now(), lost, backoff_s)
        taken += self._end_all(
            Trigger.RUN_DEADLINE,
            _columns.started_at < db_now(-SUPERVISOR_GRACE_S - _columns.run_limit_s),
            too_long,
            backoff_s,
        )
        taken += self._end_all(
            Trigger.STALLED, _columns.progressed_at < db_now(-SUPERVISOR_GRACE_S - _columns.stall_s), stalled, backoff_s
        )
        return taken

    def _end_all(
        self, trigger: Trigger, is_due: ColumnElement[bool], error: NightpressError, backoff_s: float
    ) -> list[str]:
        """End the jobs that are due, each with its own guarded UPDATE, so that replicas of the control process can't deadlock."""
        due = select(_columns.id).where(IS_LEASED, is_due).order_by(_columns.lease_expires_at).limit(_EXPIRE_BATCH)
        with transaction(self._engine, read_only=True) as connection:
            found = connection.execute(due).scalars().all()
        return [
            job_id
            for job_id in found
            if end_badly(
                self._engine,
                trigger,
                [_columns.id == job_id, IS_LEASED, is_due],
                error,
                backoff_s=backoff_s,
                outcome="lost",
                when_cancelling=CANCELLED,
            )
        ]

    def expire_queue_deadlines(self) -> list[str]:
        """queued → failed, for jobs that no worker started in time. Returns their ids."""
        is_due = _columns.start_before < db_now()
        due = select(_columns.id).where(_columns.start_before.is_not(None), is_due).limit(_EXPIRE_BATCH)
        with transaction(self._engine, read_only=True) as connection:
            found = connection.execute(due).scalars().all()
        error = NightpressError(
            ErrorCode.QUEUE_DEADLINE_EXCEEDED,
            "No worker started the job within its queue limit.",
            hint="Add workers for its queue, or raise queue_limit_s.",
        ).as_dict()
        failed = []
        for job_id in found:
            with transaction(self._engine) as connection:
                job = move(
                    connection,
                    Trigger.QUEUE_DEADLINE,
                    _columns.id == job_id,
                    is_due,
                    note=lambda _: (FAILED, {"attempt": 0, "error": error}),
                    state=FAILED,
                    error=error,
                    error_code=error["code"],
                    finished_at=db_now(),
                    start_before=null(),
                )
            if job is not None:
                failed.append(job_id)
        return failed

    def mark_swept(self, job_id: str, attempt: int) -> None:
        """Record that the files of an abandoned attempt are deleted."""
        this_attempt = (job_attempts.c.job_id == job_id, job_attempts.c.number == attempt)
        with statement(self._engine) as connection:
            connection.execute(update(job_attempts).where(*this_attempt).values(swept=True))
