"""The only writer of job state. Each transition is one guarded UPDATE, and its event is in the same transaction."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

from sqlalchemy import (
    ColumnElement,
    Engine,
    bindparam,
    case,
    func,
    insert,
    literal,
    literal_column,
    null,
    or_,
    select,
    update,
)
from sqlalchemy.engine import Connection

from nightpress.core.database import JsonType, clean_text, db_now, statement, transaction
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.frames import Progress
from nightpress.core.ids import new_id
from nightpress.core.service.access.quotas import add_gpu_time
from nightpress.core.service.jobs.claims import (
    Caps,
    claim_and_note,
    claim_job,
    claim_values,
    some_have_caps,
    whose_turn,
)
from nightpress.core.service.jobs.queries import JOB_COLUMNS, JobsWanted, job_of
from nightpress.core.service.jobs.records import Claimed, Job, Lease, Renewal, Succeeded, WorkerOffer
from nightpress.core.service.jobs.results import copy_result, write_result
from nightpress.core.service.jobs.roster import WorkerRoster
from nightpress.core.service.jobs.states import (
    CANCELLED,
    CANCELLING,
    FAILED,
    QUEUED,
    RUNNING,
    SUCCEEDED,
    AttemptOutcome,
    Trigger,
    sources,
)
from nightpress.core.service.jobs.submission import JobSubmitter
from nightpress.core.service.promotions.store import promote_accepted
from nightpress.core.service.tables.jobs import (
    IS_LEASED,
    IS_QUEUED,
    job_attempts,
    job_events,
    job_logs,
    jobs,
)
from nightpress.core.service.webhooks.outbox import note_for_webhooks
from nightpress.core.version import ENGINE

MAX_LOG_LINES = 10_000  #: a job
MAX_CANCELLED = 500  #: by one request
MAX_LOG_BYTES = 4096  #: a line
MAX_BACKOFF_S = 600.0
#: The supervisor stops a run that is too long or stalls; where it failed to, the control process does so this much later.
BELT_S = 60.0
_CLAIM_TRIES = 20
_CLAIM_LOCK = 7_126_002  #: any number but the migrations'
_CAPS_CACHE_S = 5.0
_EXPIRE_BATCH = 200

_columns = jobs.c


class JobStore(JobSubmitter, WorkerRoster):
    """Jobs from submission to their end, on SQLite or PostgreSQL. Safe to share between threads."""

    def __init__(self, engine: Engine, caps: Caps | None = None, *, oldest_share: float = 0.0) -> None:
        """oldest_share: the part of all claims that takes the oldest job, whatever its priority."""
        super().__init__(engine)
        self._caps = caps or Caps()
        self._oldest_share = oldest_share
        self._capped = (False, 0.0)  #: whether tenants have caps of their own, and until when that is believed

    # A person ----------------------------------------------------------------------------------------------------

    def request_cancel(self, tenant_id: str, job_id: str) -> Job | None:
        """queued → cancelled, running → cancelling; any other state is left as it is. None: the tenant has no such job."""
        with transaction(self._engine) as connection:
            job = self._move(
                connection,
                Trigger.CANCEL,
                _columns.id == job_id,
                _columns.tenant_id == tenant_id,
                note=lambda job: ("cancelled" if job.state == CANCELLED else "cancel_requested", {}),
                state=case((_columns.state == QUEUED, CANCELLED), else_=CANCELLING),
                finished_at=case((_columns.state == QUEUED, db_now()), else_=null()),
                start_before=null(),
            )
        return job or self.get(tenant_id, job_id)

    def cancel_all(self, tenant_id: str, wanted: JobsWanted, *, limit: int = MAX_CANCELLED) -> tuple[int, bool]:
        """Ask for the end of every job that matches and isn't over, the newest first. Returns how many, and whether more are left.

        The newest first, so that no job starts in the place of one that was cancelled just before it.
        """
        states = wanted.states or (QUEUED, RUNNING)
        matching = self._matching(tenant_id, replace(wanted, states=states))
        query = select(_columns.id).where(*matching).order_by(_columns.created_at.desc(), _columns.id.desc())
        with transaction(self._engine, read_only=True) as connection:
            found = connection.execute(query.limit(limit + 1)).scalars().all()
        asked = [self.request_cancel(tenant_id, job_id) for job_id in found[:limit]]
        return sum(job is not None and job.state in {CANCELLED, CANCELLING} for job in asked), len(found) > limit

    def reuse(self, job: Job) -> Job:
        """queued → succeeded with the result of an identical job of the same tenant, if there is one. Returns the job as it is then.

        The result is the other's: its artifacts' files, its report and its figures. Where the recipe names a device, the result was made on
        that one; with `device: auto` either will do. Where a worker was faster, the job simply runs.
        """
        if job.fingerprint is None:
            return job  # nobody knows what decided its result
        made = jobs.alias("made")
        found = (
            select(made.c.id, made.c.verdict)
            .where(made.c.tenant_id == job.tenant_id, made.c.fingerprint == job.fingerprint)
            .where(made.c.state == literal_column("'succeeded'"), made.c.reused_from.is_(None))
            .where(literal(job.recipe.get("device", "auto") == "auto") | (made.c.queue == job.queue))
            .where(made.c.engine == ENGINE)  # in a rolling upgrade an older worker may have made it
            .order_by(made.c.finished_at.desc())
            .limit(1)
            .with_for_update()  # so that it isn't pruned meanwhile
        )
        with transaction(self._engine) as connection:
            origin = connection.execute(found).one_or_none()
            if origin is None:
                return job
            done = self._move(
                connection,
                Trigger.REUSE,
                _columns.id == job.id,
                note=lambda _: (SUCCEEDED, {"attempt": 0, "verdict": origin.verdict, "reused_from": origin.id}),
                state=SUCCEEDED,
                verdict=origin.verdict,
                reused_from=origin.id,
                engine=ENGINE,
                progress=1.0,
                finished_at=db_now(),
                start_before=null(),
            )
            if done is None:
                return job
            copy_result(connection, origin.id, job.id)
            if origin.verdict == "accepted" and job.promote:
                promote_accepted(connection, job.tenant_id, job.model_name, job.id)
        return done

    # A worker ----------------------------------------------------------------------------------------------------

    def claim(self, offer: WorkerOffer, *, ttl_s: float) -> Claimed | None:
        """queued → running, for the best job that fits: by priority, then the tenant with the fewest running, then age.

        Now and then, the oldest of all: none starves behind higher priorities. None: there is nothing to do for this worker now.
        """
        values = claim_values(offer, new_id("lease"), ttl_s, self._caps)
        oldest = random.random() < self._oldest_share
        for _ in range(_CLAIM_TRIES):
            job = self._claim(values, oldest=oldest)
            if job is not None:
                return Claimed(job, Lease(job.id, str(job.lease_id), job.attempt, offer.worker_id))
            with transaction(self._engine, read_only=True) as connection:
                if self._sqlite or connection.execute(whose_turn(oldest=oldest), values).first() is None:
                    return None
            # There is work, but other workers are claiming all of the best tenant's jobs at this very moment.
            time.sleep(random.uniform(0.0, 0.005))
        return None

    def _claim(self, values: dict[str, Any], *, oldest: bool) -> Job | None:
        if not self._sqlite:
            capped = self._is_capped()  # asked once: the answer may change, and the lock holds in a transaction alone
            with transaction(self._engine) if capped else statement(self._engine) as connection:
                if capped:
                    # Two claims at a time would each count the same running jobs: where counts are bounds, one goes after the other.
                    connection.execute(select(func.pg_advisory_xact_lock(_CLAIM_LOCK)))
                row = connection.execute(claim_and_note(oldest=oldest), values).one_or_none()
            return job_of(row[:-1]) if row else None
        with transaction(self._engine) as connection:
            row = connection.execute(claim_job(oldest=oldest), values).one_or_none()
            if row is None:
                return None
            job, seq = job_of(row[:-1]), row[-1]
            data = {"attempt": job.attempt, "worker_id": job.worker_id}
            attempt = {"number": job.attempt, "lease_id": job.lease_id, "worker_id": job.worker_id}
            connection.execute(insert(job_attempts).values(job_id=job.id, started_at=job.started_at, **attempt))
            event = {"seq": seq, "kind": "started", "data": data}
            connection.execute(insert(job_events).values(job_id=job.id, at=job.started_at, **event))
        return job

    def _is_capped(self) -> bool:
        capped, until = self._capped
        if self._caps.running or time.monotonic() < until:
            return bool(self._caps.running) or capped
        with transaction(self._engine, read_only=True) as connection:
            capped = bool(connection.execute(some_have_caps()).scalar_one())
        self._capped = (capped, time.monotonic() + _CAPS_CACHE_S)
        return capped

    def renew(self, lease: Lease, *, ttl_s: float, progress: Progress | None = None) -> Renewal:
        """Extend the lease and note the progress, which never falls within an attempt."""
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
        guarded = update(jobs).where(*_holds(lease, Trigger.RENEW)).values(values).returning(_columns.state)
        with statement(self._engine) as connection:
            state = connection.execute(guarded).scalar_one_or_none()
        return Renewal(held=state is not None, cancel_requested=state == CANCELLING)

    def finish(self, lease: Lease, outcome: Succeeded) -> bool:
        """running | cancelling → succeeded, with artifacts, report and metrics. False: the lease was lost, nothing is written."""
        manifest = outcome.manifest
        if (manifest.job_id, manifest.attempt) != (lease.job_id, lease.attempt):
            raise ValueError(f"the manifest is of {manifest.job_id} attempt {manifest.attempt}, not of {lease}")
        with transaction(self._engine) as connection:
            job = self._move(
                connection,
                Trigger.FINISH,
                *_holds(lease, Trigger.FINISH),
                note=lambda _: ("succeeded", {"attempt": lease.attempt, "verdict": outcome.verdict}),
                state=SUCCEEDED,
                verdict=outcome.verdict,
                engine=ENGINE,
                progress=1.0,
                finished_at=db_now(),
                **_RESTING,
            )
            if job is None:
                return False
            _close_attempt(connection, job, "succeeded")
            write_result(connection, lease, outcome)
            if outcome.verdict == "accepted" and job.promote:
                promote_accepted(connection, job.tenant_id, job.model_name, job.id)
        return True

    def fail(
        self, lease: Lease, error: NightpressError, *, backoff_s: float
    ) -> Literal["requeued", "failed", "cancelled"] | None:
        """End an attempt that failed. None: the lease was lost, nothing is written.

        running → queued, after a pause, where the error may pass; → failed where it can't or the failures are used up.
        cancelling → failed where the work itself came to its end, else → cancelled.
        """
        ended_by_itself = not error.kind.retryable and error.code is not ErrorCode.CANCELLED
        job = self._end_badly(
            Trigger.FAIL,
            _holds(lease, Trigger.FAIL),
            error,
            backoff_s=backoff_s,
            outcome="failed",
            when_cancelling=FAILED if ended_by_itself else CANCELLED,
        )
        if job is None:
            return None
        return "failed" if job.state == FAILED else "cancelled" if job.state == CANCELLED else "requeued"

    def release(self, lease: Lease, fault: NightpressError | None = None) -> bool:
        """running → queued at once, no failure counted: the worker drains. cancelling → cancelled.

        fault: what is wrong with the worker's machine, where that is why. The job is not offered to this worker again for some minutes.
        """
        why = {} if fault is None else {"error": fault.as_dict()}
        with transaction(self._engine) as connection:
            job = self._move(
                connection,
                Trigger.RELEASE,
                *_holds(lease, Trigger.RELEASE),
                note=lambda job: (
                    CANCELLED if job.state == CANCELLED else "released",
                    {"attempt": lease.attempt, **why},
                ),
                state=case((_columns.state == CANCELLING, CANCELLED), else_=QUEUED),
                finished_at=case((_columns.state == CANCELLING, db_now()), else_=null()),
                run_after=db_now(),
                **_RESTING,
            )
            if job is None:
                return False
            _close_attempt(connection, job, "released", why.get("error"))
        return True

    def machine_faults(self, job_id: str) -> int:
        """How many attempts of a job ended by a fault of their worker's machine, and so were not counted as failures."""
        ended_so = (job_attempts.c.outcome == literal_column("'released'"), job_attempts.c.error.is_not(None))
        query = select(func.count()).where(job_attempts.c.job_id == job_id, *ended_so)
        with transaction(self._engine, read_only=True) as connection:
            return int(connection.execute(query).scalar_one())

    def confirm_cancelled(self, lease: Lease) -> bool:
        """cancelling → cancelled: the child is dead. False: not cancelling, or the lease was lost."""
        with transaction(self._engine) as connection:
            job = self._move(
                connection,
                Trigger.CONFIRM_CANCELLED,
                *_holds(lease, Trigger.CONFIRM_CANCELLED),
                note=lambda _: (CANCELLED, {"attempt": lease.attempt}),
                state=CANCELLED,
                finished_at=db_now(),
                **_RESTING,
            )
            if job is None:
                return False
            _close_attempt(connection, job, "cancelled")
        return True

    def append_logs(self, lease: Lease, lines: Sequence[tuple[str, str]]) -> bool:
        """Keep lines of (level, text), until the job has its share of them. False: the lease was lost."""
        guarded = (
            update(jobs)
            .where(*_holds(lease, Trigger.RENEW))
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

    def record_event(self, lease: Lease, kind: str, data: dict[str, Any]) -> bool:
        """Note something worth a line of history, e.g. a phase or a checkpoint: it is progress. False: the lease was lost."""
        with transaction(self._engine) as connection:
            job = self._move(
                connection,
                Trigger.RENEW,
                *_holds(lease, Trigger.RENEW),
                note=lambda _: (kind, data),
                progressed_at=db_now(),
            )
        return job is not None

    # The control process -----------------------------------------------------------------------------------------

    def expire_leases(self, *, backoff_s: float) -> list[str]:
        """Take jobs from workers that are lost, or that let a run stall or pass its limit. Returns the jobs' ids."""
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
            Trigger.RUN_DEADLINE, _columns.started_at < db_now(-BELT_S - _columns.run_limit_s), too_long, backoff_s
        )
        taken += self._end_all(
            Trigger.STALLED, _columns.progressed_at < db_now(-BELT_S - _columns.stall_s), stalled, backoff_s
        )
        return taken

    def _end_all(
        self, trigger: Trigger, is_due: ColumnElement[bool], error: NightpressError, backoff_s: float
    ) -> list[str]:
        """One guarded UPDATE a job, not one for all: replicas of the control process can then never deadlock."""
        due = select(_columns.id).where(IS_LEASED, is_due).order_by(_columns.lease_expires_at).limit(_EXPIRE_BATCH)
        with transaction(self._engine, read_only=True) as connection:
            found = connection.execute(due).scalars().all()
        return [
            job_id
            for job_id in found
            if self._end_badly(
                trigger,
                [_columns.id == job_id, IS_LEASED, is_due],
                error,
                backoff_s=backoff_s,
                outcome="lost",
                when_cancelling=CANCELLED,
            )
        ]

    def expire_queue_deadlines(self) -> list[str]:
        """queued → failed, for jobs that no worker ever started in time. Returns their ids."""
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
                job = self._move(
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
        """The files of an abandoned attempt are gone."""
        one = (job_attempts.c.job_id == job_id, job_attempts.c.number == attempt)
        with statement(self._engine) as connection:
            connection.execute(update(job_attempts).where(*one).values(swept=True))

    # The statement behind every transition -----------------------------------------------------------------------

    def _move(
        self,
        connection: Connection,
        trigger: Trigger,
        *guards: ColumnElement[bool],
        note: Callable[[Job], tuple[str, dict[str, Any]]],
        **values: Any,
    ) -> Job | None:
        """Update one job that meets the guards in a state where the trigger counts, and add the event that `note` words.

        None: no such job, and nothing is written. The event's number is counted in the same UPDATE: it has no gaps.
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
        return job

    def _end_badly(
        self,
        trigger: Trigger,
        guards: Sequence[ColumnElement[bool]],
        error: NightpressError,
        *,
        backoff_s: float,
        outcome: AttemptOutcome,
        when_cancelling: str,
    ) -> Job | None:
        """running → queued | failed, cancelling → cancelled | failed, by the error and by what the row has behind it."""
        fault = error.as_dict()
        used_up = _columns.failures + 1 >= _columns.max_failures if error.kind.retryable else literal_column("1 = 1")

        def note(job: Job) -> tuple[str, dict[str, Any]]:
            data: dict[str, Any] = {"attempt": job.attempt, "error": fault}
            if job.state != QUEUED:
                return job.state, data
            return "requeued", data | {"failures": job.failures, "run_after": job.run_after.isoformat()}

        state = case((_columns.state == CANCELLING, when_cancelling), (used_up, FAILED), else_=QUEUED)
        with transaction(self._engine) as connection:
            job = self._move(
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
                **_RESTING,
            )
            if job is None:
                return None
            _close_attempt(connection, job, outcome, fault)
        return job


#: what a job no longer has when nobody works on it
_RESTING: dict[str, Any] = {
    "lease_id": null(),
    "lease_expires_at": null(),
    "phase": null(),
    "pass_index": null(),
    "eta_s": null(),
}


def _holds(lease: Lease, trigger: Trigger) -> list[ColumnElement[bool]]:
    return [_columns.id == lease.job_id, _columns.lease_id == lease.lease_id, _columns.state.in_(sources(trigger))]


def _backed_off(backoff_s: float) -> db_now:
    """Now plus backoff · 2^failures with jitter down to half of it, at most ten minutes."""
    jitter = random.uniform(0.5, 1.0)
    doubled = backoff_s * jitter * literal_column("1").op("<<")(_columns.failures)
    bound = MAX_BACKOFF_S * jitter
    return db_now(case((doubled < bound, doubled), else_=bound))


def _close_attempt(
    connection: Connection, job: Job, outcome: AttemptOutcome, error: dict[str, Any] | None = None
) -> None:
    connection.execute(
        update(job_attempts)
        .where(job_attempts.c.job_id == job.id, job_attempts.c.number == job.attempt)
        .values(finished_at=db_now(), outcome=outcome, error=error)
    )
    if job.queue == "gpu":
        add_gpu_time(connection, job.tenant_id, job.started_at)


def _cut(text: str) -> str:
    """At most 4 KiB of UTF-8, never half a character."""
    return clean_text(text).encode()[:MAX_LOG_BYTES].decode(errors="ignore")
