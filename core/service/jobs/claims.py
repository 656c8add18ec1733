"""A worker takes a job: queued → running."""

import random
import time
from collections.abc import Collection
from typing import Any

from sqlalchemy import (
    Engine,
    func,
    select,
)
from sqlalchemy.engine import Connection

from nightpress.core.database import statement, transaction
from nightpress.core.ids import new_id
from nightpress.core.service.jobs.claim_statements import (
    Caps,
    claim_and_note,
    claim_values,
    some_have_caps,
    whose_turn,
)
from nightpress.core.service.jobs.host_claims import Refused, claim_on_cpu, claim_on_host
from nightpress.core.service.jobs.queries import job_of
from nightpress.core.service.jobs.records import Claimed, Lease, Share, WorkerOffer

_CLAIM_TRIES = 20
_CLAIM_LOCK = 7_126_002  #: key of an advisory lock; must differ from the migrations' key
_CAPS_CACHE_S = 5.0


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

    def claim(self, offer: WorkerOffer, *, ttl_s: float, in_use: Collection[str] = ()) -> Claimed | None:
        """queued → running, for the best job that fits: by priority, then the tenant with the fewest running jobs, then age.

        A random fraction (`oldest_share`) of the claims takes the oldest job instead, so that no job waits forever. On a worker of the
        queue `gpu`, the job gets GPUs that no running attempt of this worker holds.
        in_use: UUIDs of GPUs that the worker knows to be in use, whatever SQL says. Returns None if there is no job for this worker now.
        """
        values = claim_values(offer, new_id("lease"), ttl_s, self._caps)
        oldest = random.random() < self._oldest_share
        for _ in range(_CLAIM_TRIES):
            found = self._claim(offer, values, in_use, oldest=oldest)
            if isinstance(found, Claimed):
                return found
            if found is Refused.NO_JOB:
                return None
            # There is work, but other workers have locked all jobs of the best tenant at this moment.
            time.sleep(random.uniform(0.0, 0.005))
        return None

    def _claim(
        self, offer: WorkerOffer, values: dict[str, Any], in_use: Collection[str], *, oldest: bool
    ) -> Claimed | Refused:
        # Read once, and before a transaction has a connection: the answer may change, and the lock needs a transaction.
        capped = not self._sqlite and self._is_capped()
        if offer.queue == "gpu":
            with transaction(self._engine) as connection:
                if capped:
                    _take_turns(connection)
                return claim_on_host(connection, offer, values, in_use, oldest=oldest)
        if self._sqlite:
            with transaction(self._engine) as connection:
                return claim_on_cpu(connection, values, Share(offer.memory, offer.threads), oldest=oldest)
        with transaction(self._engine) if capped else statement(self._engine) as connection:
            if capped:
                _take_turns(connection)
            row = connection.execute(claim_and_note(oldest=oldest), values).one_or_none()
        if row is not None:
            job = job_of(row[:-1])
            lease = Lease(job.id, str(job.lease_id), job.attempt, offer.worker_id)
            return Claimed(job, lease, Share(offer.memory, offer.threads))
        with transaction(self._engine, read_only=True) as connection:
            there_is_work = connection.execute(whose_turn(oldest=oldest), values).first()
        return Refused.LOCKED if there_is_work else Refused.NO_JOB

    def _is_capped(self) -> bool:
        capped, until = self._capped
        if self._caps.running or time.monotonic() < until:
            return bool(self._caps.running) or capped
        with transaction(self._engine, read_only=True) as connection:
            capped = bool(connection.execute(some_have_caps()).scalar_one())
        self._capped = (capped, time.monotonic() + _CAPS_CACHE_S)
        return capped


def _take_turns(connection: Connection) -> None:
    """Let claims wait for each other until the transaction ends: two at a time would count the same running jobs and exceed the cap."""
    connection.execute(select(func.pg_advisory_xact_lock(_CLAIM_LOCK)))
