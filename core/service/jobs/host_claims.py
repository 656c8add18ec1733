"""A claim on a host with GPUs: which jobs fit what is free of it, and which GPUs and how much memory a job gets.

What is free is read from SQL: all that the worker offers, less what its running attempts hold. A lock on the worker's name lets its claims
go one after the other, so no GPU is given twice. When a lease ends, in whatever way, its GPUs are free.
"""

import datetime as dt
import enum
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import insert, select
from sqlalchemy.engine import Connection

from nightpress.core.database import lock_until_commit
from nightpress.core.service.jobs.claim_statements import claim_job, hold_back, whose_turn
from nightpress.core.service.jobs.queries import job_of
from nightpress.core.service.jobs.records import Claimed, Job, Lease, OfferedGpu, Share, WorkerOffer
from nightpress.core.service.tables.jobs import IS_LATEST_ATTEMPT, IS_LEASED, job_attempts, job_events, jobs

#: Nothing is held back: every job comes before this one.
_NOTHING_HELD = {"held_priority": -(2**31), "held_created_at": dt.datetime.max.replace(tzinfo=dt.UTC)}


class Refused(enum.Enum):
    NO_JOB = enum.auto()  #: no job fits
    LOCKED = enum.auto()  #: other workers have locked all jobs that would fit


@dataclass(frozen=True)
class Free:
    """What of a host no running attempt holds."""

    gpus: tuple[OfferedGpu, ...]
    cpu_jobs: int
    memory: int
    shares: int

    def share_of(self, job: Job, offer: WorkerOffer) -> Share:
        """What a job gets: as much of the free memory as of the free shares, or more if it needs more."""
        gpus = choose(self.gpus, job) if job.gpus else ()
        shares = max(1, len(gpus))
        memory = max(job.needs_memory, self.memory * shares // self.shares)
        return Share(memory, offer.threads_of(shares), gpus)


def kinds_of(gpus: Iterable[OfferedGpu]) -> dict[tuple[int, str], list[OfferedGpu]]:
    """(memory, name) → the GPUs of this kind; the kind with the least memory first. A job gets GPUs of one kind."""
    found: dict[tuple[int, str], list[OfferedGpu]] = {}
    for gpu in sorted(gpus, key=lambda gpu: (gpu.memory, gpu.name)):
        found.setdefault((gpu.memory, gpu.name), []).append(gpu)
    return found


def most_together(gpus: Sequence[OfferedGpu]) -> int:
    """The most of these GPUs, all of one kind, that one job can have."""
    return len(gpus) if all(gpu.whole for gpu in gpus) else 1


def choose(free: Sequence[OfferedGpu], job: Job) -> tuple[OfferedGpu, ...]:
    """The GPUs that a job gets: the first ones of the kind with the least memory that suffices. Raises LookupError if there are none."""
    for (memory, _), gpus in kinds_of(free).items():
        if job.gpu_bytes <= memory and job.needs_gpus <= most_together(gpus):
            return tuple(gpus[: job.needs_gpus])
    raise LookupError(f"{job.id} needs {job.needs_gpus} GPUs, and {free} are free")


def claim_on_host(
    connection: Connection,
    offer: WorkerOffer,
    values: dict[str, Any],
    in_use: Collection[str],
    *,
    oldest: bool,
) -> Claimed | Refused:
    """Claim a job of the queue `gpu`; if there is none, a job of the queue `cpu` that runs beside."""
    lock_until_commit(connection, f"host of {offer.worker_id}")
    free = _read_free(connection, offer, in_use)
    found: Claimed | Refused = Refused.NO_JOB
    holds_back = False
    if free.gpus:
        found, holds_back = _claim_gpus(connection, offer, free, values, oldest=oldest)
    if not isinstance(found, Claimed) and free.cpu_jobs > 0 and not holds_back:
        beside = values | {"offered_queue": "cpu", "offered_memory": free.memory}
        return _claim(connection, beside, lambda job: free.share_of(job, offer), oldest=oldest, kinds=0)
    return found


def claim_on_cpu(connection: Connection, values: dict[str, Any], share: Share, *, oldest: bool) -> Claimed | Refused:
    """Claim a job for a worker that runs one job at a time."""
    return _claim(connection, values, lambda _: share, oldest=oldest, kinds=0, shared=False)


def _claim_gpus(
    connection: Connection, offer: WorkerOffer, free: Free, values: dict[str, Any], *, oldest: bool
) -> tuple[Claimed | Refused, bool]:
    """Claim a job of the queue `gpu`. Returns also whether the host holds GPUs back for a job."""
    kinds = kinds_of(offer.gpus)
    counts = {kind: most_together(gpus) for kind, gpus in kinds_of(free.gpus).items()}
    offered = values | {"offered_memory": free.memory, "host_memory": offer.memory}
    for number, (kind, gpus) in enumerate(kinds.items()):
        memory, _ = kind
        offered[f"kind_memory_{number}"] = memory
        offered[f"free_gpus_{number}"] = counts.get(kind, 0)
        offered[f"host_gpus_{number}"] = most_together(gpus)
    held = connection.execute(hold_back(len(kinds)), offered).one_or_none() if offer.shares > 1 else None
    offered |= _NOTHING_HELD if held is None else {"held_priority": held.priority, "held_created_at": held.created_at}
    found = _claim(connection, offered, lambda job: free.share_of(job, offer), oldest=oldest, kinds=len(kinds))
    return found, held is not None


def _claim(
    connection: Connection,
    values: dict[str, Any],
    share_of: Callable[[Job], Share],
    *,
    oldest: bool,
    kinds: int,
    shared: bool = True,
) -> Claimed | Refused:
    row = connection.execute(claim_job(oldest=oldest, kinds=kinds), values).one_or_none()
    if row is None:
        waits = (
            connection.dialect.name == "postgresql"
            and connection.execute(whose_turn(oldest=oldest, kinds=kinds), values).first()
        )
        return Refused.LOCKED if waits else Refused.NO_JOB
    job, seq = job_of(row[:-1]), row[-1]
    share = share_of(job)
    lease = Lease(job.id, str(job.lease_id), job.attempt, str(job.worker_id))
    data: dict[str, Any] = {"attempt": job.attempt, "worker_id": job.worker_id}
    attempt: dict[str, Any] = {"number": job.attempt, "lease_id": job.lease_id, "worker_id": job.worker_id}
    if shared:
        attempt["memory_limit"] = share.memory
    if share.gpus:
        data["gpus"] = [gpu.uuid for gpu in share.gpus]
        attempt["gpus"] = [asdict(gpu) for gpu in share.gpus]
    connection.execute(insert(job_attempts).values(job_id=job.id, started_at=job.started_at, **attempt))
    event = {"seq": seq, "kind": "started", "data": data}
    connection.execute(insert(job_events).values(job_id=job.id, at=job.started_at, **event))
    return Claimed(job, lease, share)


def _read_free(connection: Connection, offer: WorkerOffer, in_use: Collection[str]) -> Free:
    query = (
        select(jobs.c.queue, jobs.c.needs_memory, job_attempts.c.gpus, job_attempts.c.memory_limit)
        .join_from(jobs, job_attempts, IS_LATEST_ATTEMPT)
        .where(IS_LEASED, jobs.c.worker_id == offer.worker_id)
    )
    held = set(in_use)
    cpu_jobs, memory = offer.cpu_jobs, offer.memory
    for row in connection.execute(query):
        held |= {gpu["uuid"] for gpu in row.gpus or ()}
        cpu_jobs -= row.queue == "cpu"
        memory -= row.memory_limit or row.needs_memory
    free = tuple(gpu for gpu in offer.gpus if gpu.uuid not in held)
    return Free(free, cpu_jobs, memory, max(1, len(free) + cpu_jobs))
