"""The store with a million jobs in PostgreSQL, beside ten thousand: claims, pages and ticks; and many workers that claim at the same time.

    python -m bench.many_jobs [--jobs 10000 1000000]

Nine of ten jobs have ended. The others wait, spread over twenty tenants and five priorities. PostgreSQL runs with fsync. Latencies are
those of single calls from one client. The rate of claims is that of four processes with fifty simulated workers each, which claim until
no job is left. Two figures of each call do not depend on other work on the machine: its number of statements, and the server's CPU time.
Writing a million rows takes about a minute.
"""

import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sqlalchemy import Engine, event, text

from bench.processes import cpu_seconds
from bench.record import Figure, finish, make_parser
from nightpress import migrations
from nightpress.core.database import make_engine, transaction
from nightpress.core.errors import NightpressError
from nightpress.core.service.jobs.queries import JobsWanted
from nightpress.core.service.jobs.store import JobStore
from tests.jobs import add_model, offer, submit
from tests.servers import Postgres

CALLS, TURNS, WARM = 600, 6, 20
PROCESSES, WORKERS_EACH, RACED = 4, 50, 4000

_FILL = """
INSERT INTO jobs (id, tenant_id, name, state, verdict, progress, message, priority, labels, queue, needs_memory, model_id, model_name,
  model_digest, recipe, data, attempt, failures, max_failures, run_limit_s, stall_s, created_at, run_after, started_at, finished_at,
  event_seq, log_seq)
SELECT 'job_' || lpad(n::text, 26, '0'), 'tenant-' || n / 10 % 20, '', CASE WHEN n % 10 = 0 THEN 'queued' ELSE 'succeeded' END,
  CASE WHEN n % 10 = 0 THEN NULL ELSE 'accepted' END, 0, '', n / 200 % 5 - 2, '{}', 'cpu', 1000000, 'model_tiny', 'tiny', 'sha256:0',
  '{"name":"bench","passes":[{"pass":"magnitude"}],"exports":["safetensors"]}', '{}', 0, 0, 3, 3600, 1800,
  now() - (:count - n) * interval '10 ms', now() - interval '1 hour', NULL,
  CASE WHEN n % 10 = 0 THEN NULL ELSE now() END, 1, 0
FROM generate_series(1, :count) AS n
"""


#: The indexes of the table of jobs that belong to no constraint. Creating them after all rows are inserted takes a third of the time.
_INDEXES = """
SELECT indexname, indexdef FROM pg_indexes
WHERE tablename = 'jobs' AND indexname NOT IN (SELECT conname FROM pg_constraint)
"""


def fill(engine: Engine, count: int) -> None:
    add_model(engine)
    with transaction(engine) as connection:
        indexes = connection.execute(text(_INDEXES)).all()
        for name, _ in indexes:
            connection.execute(text(f'DROP INDEX "{name}"'))
        # Skip the checks of foreign keys: every row names the same model.
        connection.execute(text("SET LOCAL session_replication_role = replica"))
        connection.execute(text(_FILL), {"count": count})
        for _, definition in indexes:
            connection.execute(text(definition))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE"))


class Side:
    """A database with `count` jobs, the calls that are measured, and the figures found."""

    def __init__(self, server: Postgres, count: int) -> None:
        url = server.create_database()
        migrations.upgrade(url)
        self.engine = make_engine(url)
        began = time.monotonic()
        fill(self.engine, count)
        self.found: dict[str, float] = {"fill_s": round(time.monotonic() - began, 1)}
        self.statements = 0
        event.listen(self.engine, "before_cursor_execute", self._count)
        store = JobStore(self.engine)
        cursors: list[str | None] = [None]
        for _ in range(20):
            cursors.append(store.reader.page("tenant-3", cursor=cursors[-1], limit=50)[1])
        self.calls: dict[str, Callable[[int], object]] = {
            "claim": lambda n: store.claims.claim(offer(f"w{n}"), ttl_s=3600.0),
            "page": lambda n: store.reader.page("tenant-3", cursor=cursors[n % len(cursors)], limit=50),
            "page_by_state": lambda _n: store.reader.page("tenant-3", JobsWanted(states=("queued",)), limit=50),
            "tick": lambda _n: _tick(store),
            "statistics": lambda _n: store.reader.statistics(),
        }

    def _count(self, *_: object) -> None:
        self.statements += 1


def measure(server: Postgres, counts: list[int]) -> list[dict[str, float]]:
    """For each count and call: median and 99th percentile in ms, number of statements, and ms of the server's CPU time.

    The databases take turns, so that other work on the machine affects all of them equally.
    """
    sides = [Side(server, count) for count in counts]
    for name in sides[0].calls:
        turn = 4 if name == "statistics" else CALLS // TURNS
        for side in sides:
            for n in range(WARM):  # connections of a real pool are open already, and have prepared frequent statements
                side.calls[name](n)
            side.statements = 0
        times: list[list[float]] = [[] for _ in sides]
        cpu = [0.0] * len(sides)
        for _ in range(TURNS):
            for index, side in enumerate(sides):
                before = _cpu_s(server)
                times[index] += (_timed(side.calls[name], len(times[index])) for _ in range(turn))
                cpu[index] += _cpu_s(server) - before
        for index, side in enumerate(sides):
            took = sorted(times[index])
            side.found[f"{name}_p50_ms"] = round(statistics.median(took), 2)
            side.found[f"{name}_p99_ms"] = round(took[int(0.99 * (len(took) - 1))], 2)
            side.found[f"{name}_statements"] = round(side.statements / len(took), 1)
            side.found[f"{name}_cpu_ms"] = round(1000 * cpu[index] / len(took), 2)
    for side in sides:
        side.engine.dispose()
    return [side.found for side in sides]


def _cpu_s(server: Postgres) -> float:
    """CPU seconds of all of PostgreSQL's processes so far."""
    assert server.process is not None
    return cpu_seconds(server.process.pid)


def _timed(call: Callable[[int], object], n: int) -> float:
    began = time.perf_counter()
    call(n)
    return 1000 * (time.perf_counter() - began)


def _tick(store: JobStore) -> None:
    """The calls that the control process makes to the store every two seconds."""
    store.expiry.expire_leases(backoff_s=5.0)
    store.expiry.expire_queue_deadlines()
    store.reader.queues_with_work()
    store.roster.workers()


def race(server: Postgres) -> dict[str, float]:
    """Two hundred workers claim until no job is left. Jobs end half a second after their claim: no more run than there are workers."""
    url = server.create_database()
    migrations.upgrade(url)
    engine = make_engine(url)
    add_model(engine)
    store = JobStore(engine)
    jobs = {submit(store, tenant_id=f"tenant-{n % 20}") for n in range(RACED)}
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE"))  # as autovacuum would within a minute
    context = multiprocessing.get_context("spawn")
    over = threading.Event()
    ender = threading.Thread(target=_end_jobs, args=(engine, over))
    ender.start()
    began, cpu = time.monotonic(), _cpu_s(server)
    with context.Pool(PROCESSES) as pool:
        shares = pool.starmap(_claim_all, [(url, n) for n in range(PROCESSES)])
    over.set()
    ender.join()
    seconds = max(end for _, _, end in shares) - min(start for _, start, _ in shares)
    claimed = Counter(job for share, _, _ in shares for job in share)
    engine.dispose()
    return {
        "workers": PROCESSES * WORKERS_EACH,
        "jobs": len(jobs),
        "claimed_twice": sum(times > 1 for times in claimed.values()),
        "missed": len(jobs - set(claimed)),
        "claims_per_s": round(sum(claimed.values()) / seconds, 1),
        "cpu_ms_a_claim": round(1000 * (_cpu_s(server) - cpu) / len(jobs), 2),
        "wall_s": round(time.monotonic() - began, 1),
    }


_END = """
UPDATE jobs SET state = 'cancelled', lease_id = NULL, lease_expires_at = NULL, finished_at = clock_timestamp()
WHERE lease_id IS NOT NULL AND started_at < clock_timestamp() - interval '0.5 s'
"""


def _end_jobs(engine: Engine, over: threading.Event) -> None:
    while not over.wait(0.1):
        with transaction(engine) as connection:
            connection.execute(text(_END))


def _claim_all(url: str, number: int) -> tuple[list[str], float, float]:
    store = JobStore(make_engine(url, pool_size=8))

    def work(name: str) -> list[str]:
        found = []
        while True:
            try:
                claimed = store.claims.claim(offer(name), ttl_s=3600.0)
            except NightpressError:
                continue  # no connection was free in time
            if claimed is None:
                return found
            found.append(claimed.job.id)

    began = time.time()
    with ThreadPoolExecutor(WORKERS_EACH) as pool:
        shares = list(pool.map(work, (f"w{number}-{n}" for n in range(WORKERS_EACH))))
    return [job for share in shares for job in share], began, time.time()


#: call → largest 99th percentile in milliseconds, for the largest number of jobs
BARS_MS = {"claim": 15, "page": 30, "page_by_state": 30, "tick": 200}
UNITS = {"s": "s", "ms": "ms", "cpu_ms": "ms of the server's CPU time", "statements": "statements"}


def figures_of(counts: list[int], sides: list[dict[str, float]], raced: dict[str, float]) -> list[Figure]:
    figures = []
    for count, side in zip(counts, sides, strict=True):
        for name, value in side.items():
            call = next((call for call in sorted(BARS_MS, key=len, reverse=True) if name.startswith(call)), "")
            barred = count == max(counts) and name == f"{call}_p99_ms"
            unit = next((unit for end, unit in reversed(UNITS.items()) if name.endswith(f"_{end}")), "")
            figures.append(Figure(f"{count} jobs/{name}", value, unit, bar=f"< {BARS_MS[call]}" if barred else ""))
    for call in BARS_MS:
        growth = sides[-1][f"{call}_p99_ms"] / sides[0][f"{call}_p99_ms"]
        figures.append(Figure(f"growth/{call}", round(growth, 2), "×", bar="<= 2"))
    bars = {"claimed_twice": "<= 0", "missed": "<= 0", "claims_per_s": ">= 300"}
    return figures + [Figure(f"race/{name}", value, bar=bars.get(name, "")) for name, value in raced.items()]


def main() -> int:
    parser = make_parser("many_jobs", __doc__)
    parser.add_argument("--jobs", type=int, nargs="+", default=[10_000, 1_000_000])
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="nightpress-bench-") as folder,
        Postgres(Path(folder), durable=True) as server,
    ):
        figures = figures_of(options.jobs, measure(server, options.jobs), race(server))
    return finish("many_jobs", figures, parser, options)


if __name__ == "__main__":
    sys.exit(main())
