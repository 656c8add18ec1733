"""Requests about existing jobs: cancel them, or reuse the result of an identical job."""

from dataclasses import replace

from sqlalchemy import (
    Engine,
    case,
    literal,
    literal_column,
    null,
    select,
)

from nightpress.core.database import db_now, transaction
from nightpress.core.recipes.passes.catalog import packages_of
from nightpress.core.service.jobs.queries import JobReader, JobsWanted
from nightpress.core.service.jobs.records import Job
from nightpress.core.service.jobs.results import copy_result, hand_on
from nightpress.core.service.jobs.states import (
    CANCELLED,
    CANCELLING,
    QUEUED,
    RUNNING,
    SUCCEEDED,
    Trigger,
)
from nightpress.core.service.jobs.transitions import move
from nightpress.core.service.tables.jobs import (
    jobs,
)
from nightpress.core.version import ENGINE, engine_with

MAX_CANCELLED = 500  #: jobs per request

_columns = jobs.c


class JobRequests:
    """Cancels jobs and reuses results."""

    def __init__(self, engine: Engine, reader: JobReader) -> None:
        self._engine = engine
        self._reader = reader

    def request_cancel(self, tenant_id: str, job_id: str) -> Job | None:
        """queued → cancelled, running → cancelling; any other state stays. None: the tenant has no such job."""
        with transaction(self._engine) as connection:
            job = move(
                connection,
                Trigger.CANCEL,
                _columns.id == job_id,
                _columns.tenant_id == tenant_id,
                note=lambda job: ("cancelled" if job.state == CANCELLED else "cancel_requested", {}),
                state=case((_columns.state == QUEUED, CANCELLED), else_=CANCELLING),
                finished_at=case((_columns.state == QUEUED, db_now()), else_=null()),
                start_before=null(),
            )
        return job or self._reader.get(tenant_id, job_id)

    def cancel_all(self, tenant_id: str, wanted: JobsWanted, *, limit: int = MAX_CANCELLED) -> tuple[int, bool]:
        """Cancel up to `limit` jobs that match and have not ended. Returns their number, and whether more jobs are left.

        The newest jobs are cancelled first, so that no job of the set starts on a worker that an earlier cancellation has freed.
        """
        states = wanted.states or (QUEUED, RUNNING)
        matching = self._reader.matching(tenant_id, replace(wanted, states=states))
        query = select(_columns.id).where(*matching).order_by(_columns.created_at.desc(), _columns.id.desc())
        with transaction(self._engine, read_only=True) as connection:
            found = connection.execute(query.limit(limit + 1)).scalars().all()
        asked = [self.request_cancel(tenant_id, job_id) for job_id in found[:limit]]
        return sum(job is not None and job.state in {CANCELLED, CANCELLING} for job in asked), len(found) > limit

    def reuse(self, job: Job) -> Job:
        """queued → succeeded with the result of an identical job of the same tenant, if there is one. Returns the job afterwards.

        The job shares the files of the other job's artifacts, and gets copies of its report and its metrics. If the recipe names a device,
        only a result from that device is reused; with `device: auto`, from either. Likewise for `gpus`: with a number, only a result from as
        many GPUs. If a worker claims the job first, it simply runs.
        """
        if job.fingerprint is None:
            return job  # without a fingerprint, no identical job can be found
        engine = engine_with(ENGINE, packages_of(job.recipe))
        made = jobs.alias("made")
        found = (
            select(made.c.id, made.c.verdict)
            .where(made.c.tenant_id == job.tenant_id, made.c.fingerprint == job.fingerprint)
            .where(made.c.state == literal_column("'succeeded'"), made.c.reused_from.is_(None))
            .where(literal(job.recipe.get("device", "auto") == "auto") | (made.c.queue == job.queue))
            .where(literal(job.recipe.get("gpus", 1) == "auto") | (made.c.needs_gpus == job.needs_gpus))
            .where(made.c.engine == engine)  # during a rolling upgrade, an older worker may have made the result
            .order_by(made.c.finished_at.desc())
            .limit(1)
            .with_for_update()  # so that retention does not prune it now
        )
        with transaction(self._engine) as connection:
            origin = connection.execute(found).one_or_none()
            if origin is None:
                return job
            done = move(
                connection,
                Trigger.REUSE,
                _columns.id == job.id,
                note=lambda _: (SUCCEEDED, {"attempt": 0, "verdict": origin.verdict, "reused_from": origin.id}),
                state=SUCCEEDED,
                verdict=origin.verdict,
                reused_from=origin.id,
                engine=engine,
                progress=1.0,
                finished_at=db_now(),
                start_before=null(),
            )
            if done is None:
                return job
            copy_result(connection, origin.id, job.id, origin.verdict)
            if origin.verdict == "accepted":
                hand_on(connection, done)
        return done
