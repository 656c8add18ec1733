"""The roster of workers: which are alive, what each does now, and which were seen lately."""

import datetime as dt
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import CursorResult, Engine, delete, func, insert, select, update

from nightpress.core.database import db_now, read_now, statement, transaction
from nightpress.core.recipes.gpu_count import largest_host
from nightpress.core.recipes.placement import Queue, Seat
from nightpress.core.service.jobs.records import Job, Worker, WorkerState
from nightpress.core.service.jobs.states import QUEUED
from nightpress.core.service.tables.jobs import IS_LATEST_ATTEMPT, IS_LEASED, job_attempts, jobs, workers

WORKER_LOST_S = 30.0  #: seconds without a heartbeat after which a worker is shown as lost
_TOLD = (
    "host",
    "queue",
    "device",
    "memory",
    "threads",
    "version",
    "draining",
    "unfit",
    "gpu_memory",
    "gpu_memory_used",
    "gpus",
    "gpu_kinds",
    "cpu_jobs",
    "vllm",
)
_KIND = ("queue", "memory", "threads", "gpu_memory", "vllm", "gpu_kinds", "cpu_jobs")
LOST_SHOWN_S = 3600.0  #: seconds after its last heartbeat for which a lost worker is shown
#: Seconds for which the fleet remembers a worker. A week: a GPU may run only at night or on workdays, or start when a job waits for it.
FLEET_MEMORY_S = 7 * 24 * 3600.0
UNSERVED_S = 3600.0  #: seconds without a worker that could take a queued job, after which the job shows a notice


@dataclass(frozen=True)
class Fleet:
    """The kinds of workers that were seen lately."""

    seats: tuple[Seat, ...]
    at: dt.datetime  #: the database's time

    def unserved_s(
        self, queue: Queue, needs_memory: int = 0, needs_gpu_memory: int = 0, needs_gpus: int = 1
    ) -> float | None:
        """Seconds since a worker was seen that could hold a job with these needs. None: longer ago than the fleet remembers.

        needs_memory: bytes. needs_gpu_memory: bytes of each of its GPUs.
        """
        seen = [
            seat.seen_s
            for seat in self.seats
            if seat.queue == queue and seat.holds(needs_memory, needs_gpu_memory, needs_gpus)
        ]
        return min(seen, default=None)

    def notice(self, job: Job) -> str | None:
        """A text for a queued job that no worker could have taken for UNSERVED_S seconds; None for any other job."""
        waited = (self.at - max(job.created_at, job.run_after)).total_seconds()
        silent = self.unserved_s(job.queue, job.needs_memory, job.gpu_bytes, job.needs_gpus)
        if job.state != QUEUED or (waited if silent is None else silent) < UNSERVED_S:
            return None
        served = any(seat.queue == job.queue and seat.seen_s < UNSERVED_S for seat in self.seats)
        largest = largest_host(self.seats)
        if job.gpus > largest > 0:
            whom = f"gpu worker with {job.gpus} GPUs (the largest has {largest})"
        else:
            whom = f"{job.queue} worker that could hold it" if served else f"{job.queue} worker"
        since = "lately" if silent is None else f"for {silent / 3600:.0f} h"
        again = ", or cancel it and submit it again: `device: auto` is then decided anew"
        mend = f"Start one with NIGHTPRESS_WORKER_QUEUE={job.queue}"
        return f"No {whom} has been seen {since}. {mend}{again if job.recipe.get('device') == 'auto' else ''}."


class WorkerRoster:
    """The table of workers. It does not decide about jobs: leases do."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def heartbeat_worker(self, worker: Worker) -> None:
        """Record that a worker is alive. The first call adds it."""
        told = {name: getattr(worker, name) for name in _TOLD}
        with transaction(self._engine) as connection:
            seen = connection.execute(
                update(workers).where(workers.c.id == worker.id).values(**told, last_seen_at=db_now(), left_at=None)
            )
            if not seen.rowcount:
                connection.execute(
                    insert(workers).values(id=worker.id, **told, started_at=db_now(), last_seen_at=db_now())
                )

    def remove_worker(self, worker_id: str) -> None:
        """Record that a worker has stopped. It is no longer shown, but the fleet still remembers what it offered."""
        with statement(self._engine) as connection:
            gone = update(workers).where(workers.c.id == worker_id)
            connection.execute(gone.values(left_at=db_now(), last_seen_at=db_now()))

    def fleet(self) -> Fleet:
        """The kinds of workers that were seen within FLEET_MEMORY_S, each once, with the time since a worker of the kind was last seen."""
        kind = [workers.c[name] for name in _KIND]
        query = (
            select(*kind, func.max(workers.c.last_seen_at).label("seen"))
            .where(workers.c.last_seen_at >= db_now(-FLEET_MEMORY_S))
            .group_by(*kind)
        )
        with transaction(self._engine, read_only=True) as connection:
            rows = connection.execute(query).all()
            now = read_now(connection)
        return Fleet(tuple(seat for row in rows for seat in _seats_of(row, now)), now)

    def forget_workers(self, older_than_s: float) -> int:
        """Delete workers that were last seen more than `older_than_s` seconds ago. Returns their number."""
        with statement(self._engine) as connection:
            gone: CursorResult[Any] = connection.execute(
                delete(workers).where(workers.c.last_seen_at < db_now(-older_than_s))
            )
            return gone.rowcount

    def workers(self) -> list[Worker]:
        """All known workers and what they do now. A worker that holds a lease is busy; one without a recent heartbeat is lost."""
        query = (
            select(workers, (workers.c.last_seen_at < db_now(-WORKER_LOST_S)).label("lost"))
            .where(workers.c.left_at.is_(None), workers.c.last_seen_at >= db_now(-LOST_SHOWN_S))
            .order_by(workers.c.id)
        )
        leased = (
            select(jobs.c.worker_id, jobs.c.id, job_attempts.c.gpus)
            .join_from(jobs, job_attempts, IS_LATEST_ATTEMPT)
            .where(IS_LEASED)
            .order_by(jobs.c.id)
        )
        with transaction(self._engine, read_only=True) as connection:
            rows = connection.execute(query).mappings().all()
            held: dict[str, dict[str, list[str]]] = {}
            for worker_id, job_id, gpus in connection.execute(leased):
                held.setdefault(worker_id, {})[job_id] = [gpu["uuid"] for gpu in gpus or ()]
        found = []
        for row in rows:
            running = held.get(row["id"], {})
            holders = {uuid: job_id for job_id, uuids in running.items() for uuid in uuids}
            gpus = row["gpus"] and [{**gpu, "job_id": holders.get(gpu["uuid"])} for gpu in row["gpus"]]
            values = {key: value for key, value in row.items() if key not in {"lost", "left_at"}}
            values |= {"job_ids": list(running), "gpus": gpus}
            busy: WorkerState = "busy" if running else "idle"
            told: WorkerState = "draining" if row["draining"] else "unfit" if row["unfit"] and busy == "idle" else busy
            state: WorkerState = "lost" if row["lost"] else told
            found.append(Worker(**values, state=state))
        return found


def _seats_of(row: Any, now: dt.datetime) -> Iterator[Seat]:
    """What a kind of worker offers to a job: a seat for each kind of its GPUs, and one for the jobs that run beside."""
    seen_s = max(0.0, (now - row.seen).total_seconds())
    for memory, count in row.gpu_kinds or [(row.gpu_memory, 1)]:
        yield Seat(row.queue, row.memory, row.threads, memory, seen_s, row.vllm, count)
    if row.cpu_jobs:
        yield Seat("cpu", row.memory, row.threads, None, seen_s, row.vllm)
