"""A worker takes a job: queued → running."""

import random
import time
from typing import Any

from sqlalchemy import (
    Engine,
    func,
    insert,
    select,
)

from nightpress.core.database import statement, transaction
from nightpress.core.ids import new_id
from nightpress.core.service.jobs.claim_statements import (
    Caps,
    claim_and_note,
    claim_job,
    claim_values,
    some_have_caps,
    whose_turn,
)
from nightpress.core.service.jobs.queries import job_of
from nightpress.core.service.jobs.records import Claimed, Job, Lease, WorkerOffer
from nightpress.core.service.tables.jobs import (
    job_attempts,
    job_events,
    jobs,
)

_CLAIM_TRIES = 20
_CLAIM_LOCK = 7_126_002  #: key of an advisory lock; must differ from the migrations' key
_CAPS_CACHE_S = 5.0

_columns = jobs.c


class JobClaims:
    """Assigns queued jobs to workers."""

    def __init__(self, engine: Engine, caps: Caps, *, oldest_share: float) -> None:
        """oldest_share: the fraction of claims, 0 to 1, that takes the oldest job, whatever its priority."""
        self._engine = engine
        self._sqlite = engine.dialect.name == "sqlite"
        self._caps = caps
        self._oldest_share = oldest_share
        #: whether any tenant has caps of its own, and the monotonic time until which this answer is used
        self._capped = (False, 0.0)

    def claim(self, offer: WorkerOffer, *, ttl_s: float) -> Claimed | None:
        """queued → running, for the best job that fits: by priority, then the tenant with the fewest running jobs, then age.

        A random fraction (`oldest_share`) of the claims takes the oldest job instead, so that no job waits forever.
        Returns None if there is no job for this worker now.
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
            # There is work, but other workers have locked all jobs of the best tenant at this moment.
            time.sleep(random.uniform(0.0, 0.005))
        return None

    def _claim(self, values: dict[str, Any], *, oldest: bool) -> Job | None:
        if not self._sqlite:
            capped = self._is_capped()  # read once: the answer may change, and the lock below needs a transaction
            with transaction(self._engine) if capped else statement(self._engine) as connection:
                if capped:
                    # Two claims at the same time would both count the same running jobs and exceed the cap. Let them wait for each other.
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
