"""The writes of a worker that holds a lease: it renews the lease, reports progress, and ends its attempt."""

from collections.abc import Sequence
from typing import Any, Literal

from sqlalchemy import (
    Engine,
    case,
    insert,
    null,
    or_,
    update,
)

from nightpress.core.database import clean_text, db_now, statement, transaction
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.frames import Progress
from nightpress.core.service.jobs.records import Lease, Renewal, Succeeded
from nightpress.core.service.jobs.results import hand_on, write_result
from nightpress.core.service.jobs.states import (
    CANCELLED,
    CANCELLING,
    FAILED,
    QUEUED,
    SUCCEEDED,
    Trigger,
)
from nightpress.core.service.jobs.transitions import RESTING, close_attempt, end_badly, holds, move
from nightpress.core.service.tables.jobs import (
    job_logs,
    jobs,
)
from nightpress.core.version import ENGINE, engine_with

MAX_LOG_LINES = 10_000  #: per job
MAX_LOG_BYTES = 4096  #: per line

_columns = jobs.c


class JobAttempts:
    """The writes of a worker that holds a lease. If the lease was lost, nothing is written."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def renew(self, lease: Lease, *, ttl_s: float, progress: Progress | None = None) -> Renewal:
        """Extend the lease by `ttl_s` seconds from now and store the progress. Within an attempt, the stored fraction never decreases."""
        values: dict[str, Any] = {"lease_expires_at": db_now(ttl_s)}
        if progress is not None:
            message = clean_text(progress.message)
            moved = or_(
                _columns.progress < progress.fraction,
                _columns.phase != progress.phase,
                _columns.message != message,
                _columns.pass_index.is_distinct_from(progress.pass_index),
            )
            values |= {
                "phase": progress.phase,
                "progress": case((_columns.progress < progress.fraction, progress.fraction), else_=_columns.progress),
                "pass_index": progress.pass_index,
                "eta_s": progress.eta_s,
                "message": message,
                "progressed_at": case((moved, db_now()), else_=_columns.progressed_at),
            }
        guarded = update(jobs).where(*holds(lease, Trigger.RENEW)).values(values).returning(_columns.state)
        with statement(self._engine) as connection:
            state = connection.execute(guarded).scalar_one_or_none()
        return Renewal(held=state is not None, cancel_requested=state == CANCELLING)

    def record_event(self, lease: Lease, kind: str, data: dict[str, Any]) -> bool:
        """Add a line to the job's history, e.g. a phase or a checkpoint. This counts as progress. False: the lease was lost."""
        with transaction(self._engine) as connection:
            job = move(
                connection,
                Trigger.RENEW,
                *holds(lease, Trigger.RENEW),
                note=lambda _: (kind, data),
                progressed_at=db_now(),
            )
        return job is not None

    def append_logs(self, lease: Lease, lines: Sequence[tuple[str, str]]) -> bool:
        """Store lines of (level, text), at most MAX_LOG_LINES per job. False: the lease was lost."""
        guarded = (
            update(jobs)
            .where(*holds(lease, Trigger.RENEW))
            .values(log_seq=_columns.log_seq + len(lines), progressed_at=db_now())
            .returning(_columns.log_seq, db_now())
        )
        with transaction(self._engine) as connection:
            row = connection.execute(guarded).one_or_none()
            if row is None:
                return False
            last, now = row
            numbered = enumerate(lines, last - len(lines) + 1)
            rows = [
                {
                    "job_id": lease.job_id,
                    "seq": seq,
                    "at": now,
                    "attempt": lease.attempt,
                    "level": level if seq < MAX_LOG_LINES else "warning",
                    "text": _cut(text) if seq < MAX_LOG_LINES else "The log is full: later lines are dropped.",
                }
                for seq, (level, text) in numbered
                if seq <= MAX_LOG_LINES
            ]
            if rows:
                connection.execute(insert(job_logs), rows)
        return True

    def finish(self, lease: Lease, outcome: Succeeded) -> bool:
        """running | cancelling → succeeded, with artifacts, report and metrics. False: the lease was lost, nothing is written."""
        manifest = outcome.manifest
        if (manifest.job_id, manifest.attempt) != (lease.job_id, lease.attempt):
            raise ValueError(f"the manifest is of {manifest.job_id} attempt {manifest.attempt}, not of {lease}")
        with transaction(self._engine) as connection:
            job = move(
                connection,
                Trigger.FINISH,
                *holds(lease, Trigger.FINISH),
                note=lambda _: ("succeeded", {"attempt": lease.attempt, "verdict": outcome.verdict}),
                state=SUCCEEDED,
                verdict=outcome.verdict,
                engine=engine_with(ENGINE, outcome.packages),
                progress=1.0,
                finished_at=db_now(),
                **RESTING,
            )
            if job is None:
                return False
            close_attempt(connection, job, "succeeded")
            write_result(connection, lease, outcome)
            if outcome.verdict == "accepted":
                hand_on(connection, job)
        return True

    def fail(
        self, lease: Lease, error: NightpressError, *, backoff_s: float
    ) -> Literal["requeued", "failed", "cancelled"] | None:
        """End an attempt that failed. None: the lease was lost, nothing is written.

        running → queued, after a pause, if the error is retryable; → failed if it is not, or if the job has no failures left.
        cancelling → failed if the work failed with an error that is not retryable, else → cancelled.
        """
        ended_by_itself = not error.kind.retryable and error.code is not ErrorCode.CANCELLED
        job = end_badly(
            self._engine,
            Trigger.FAIL,
            holds(lease, Trigger.FAIL),
            error,
            backoff_s=backoff_s,
            outcome="failed",
            when_cancelling=FAILED if ended_by_itself else CANCELLED,
        )
        if job is None:
            return None
        return "failed" if job.state == FAILED else "cancelled" if job.state == CANCELLED else "requeued"

    def release(self, lease: Lease, fault: NightpressError | None = None) -> bool:
        """running → queued at once, without counting a failure, e.g. because the worker drains. cancelling → cancelled.

        fault: given if the worker's machine has failed. For some minutes, the job is then not offered to this worker again.
        """
        why = {} if fault is None else {"error": fault.as_dict()}
        with transaction(self._engine) as connection:
            job = move(
                connection,
                Trigger.RELEASE,
                *holds(lease, Trigger.RELEASE),
                note=lambda job: (
                    CANCELLED if job.state == CANCELLED else "released",
                    {"attempt": lease.attempt, **why},
                ),
                state=case((_columns.state == CANCELLING, CANCELLED), else_=QUEUED),
                finished_at=case((_columns.state == CANCELLING, db_now()), else_=null()),
                run_after=db_now(),
                **RESTING,
            )
            if job is None:
                return False
            close_attempt(connection, job, "released", why.get("error"))
        return True

    def confirm_cancelled(self, lease: Lease) -> bool:
        """cancelling → cancelled: the child is dead. False: not cancelling, or the lease was lost."""
        with transaction(self._engine) as connection:
            job = move(
                connection,
                Trigger.CONFIRM_CANCELLED,
                *holds(lease, Trigger.CONFIRM_CANCELLED),
                note=lambda _: (CANCELLED, {"attempt": lease.attempt}),
                state=CANCELLED,
                finished_at=db_now(),
                **RESTING,
            )
            if job is None:
                return False
            close_attempt(connection, job, "cancelled")
        return True


def _cut(text: str) -> str:
    """The text, cut to MAX_LOG_BYTES of UTF-8 at the end of a character."""
    return clean_text(text).encode()[:MAX_LOG_BYTES].decode(errors="ignore")
