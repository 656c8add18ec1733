"""The workers that there are, and what each does now."""

from typing import Any

from sqlalchemy import CursorResult, Engine, delete, func, insert, select, update

from core.database import db_now, statement, transaction
from core.jobs.queries import IS_LEASED
from core.jobs.records import Worker, WorkerState
from core.jobs.tables import jobs, workers

WORKER_LOST_S = 30.0  #: a worker not seen for so long is shown as lost
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
)


class WorkerRoster:
    """The workers' part of the job store. It decides nothing about jobs: leases do."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def heartbeat_worker(self, worker: Worker) -> None:
        """Say that a worker is alive; the first time, that it exists."""
        told = {name: getattr(worker, name) for name in _TOLD}
        with transaction(self._engine) as connection:
            seen = connection.execute(
                update(workers).where(workers.c.id == worker.id).values(**told, last_seen_at=db_now())
            )
            if not seen.rowcount:
                connection.execute(
                    insert(workers).values(id=worker.id, **told, started_at=db_now(), last_seen_at=db_now())
                )

    def remove_worker(self, worker_id: str) -> None:
        """A worker says good-bye."""
        with statement(self._engine) as connection:
            connection.execute(delete(workers).where(workers.c.id == worker_id))

    def forget_lost_workers(self, older_than_s: float) -> int:
        """Forget workers that went without good-bye so long ago that nobody looks for them. Returns how many."""
        with statement(self._engine) as connection:
            gone: CursorResult[Any] = connection.execute(
                delete(workers).where(workers.c.last_seen_at < db_now(-older_than_s))
            )
            return gone.rowcount

    def workers(self) -> list[Worker]:
        """All known workers with what they do now: busy is who holds a lease, lost who wasn't seen for a while."""
        held = select(jobs.c.worker_id, func.min(jobs.c.id).label("job_id")).where(IS_LEASED).group_by(jobs.c.worker_id)
        leases = held.subquery()
        query = (
            select(workers, leases.c.job_id, (workers.c.last_seen_at < db_now(-WORKER_LOST_S)).label("lost"))
            .join_from(workers, leases, leases.c.worker_id == workers.c.id, isouter=True)
            .order_by(workers.c.id)
        )
        with transaction(self._engine, read_only=True) as connection:
            rows = connection.execute(query).mappings().all()
        found = []
        for row in rows:
            values = {key: value for key, value in row.items() if key != "lost"}
            busy: WorkerState = "busy" if row["job_id"] else "idle"
            told: WorkerState = "draining" if row["draining"] else "unfit" if row["unfit"] and busy == "idle" else busy
            state: WorkerState = "lost" if row["lost"] else told
            found.append(Worker(**values, state=state))
        return found
