"""A study of 2,000 trials that exist only as rows: what each step of the control process costs, and how busy 64 workers are.

    python -m bench.studies [--trials 2000] [--workers 64]

Trials are real jobs in PostgreSQL, with claims and leases. Nothing is pressed: a job ends after one to three minutes of a clock that the
benchmark moves, with a made-up figure. The control process takes a step every two seconds of that clock. A worker that has ended its job
claims the next at once, if there is one; else it waits for the next step. The first and the last rounds are left out of the share of
time in which workers are busy.

Three figures of each step: its milliseconds, the CPU time of its thread, and the CPU time of the database's processes meanwhile. The last
two are nearly the same on a busy machine. The early steps are the second tenth, the late steps the last tenth but one, both with new trials.
"""

import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bench.record import Figure, finish, make_parser
from nightpress import migrations
from nightpress.core.service.jobs.records import Claimed, WorkerOffer
from nightpress.core.wire.studies import StudyView
from tests.models import bert_tiny_dir
from tests.servers import Postgres
from tests.studies import StudyWorld

TICK_S = 2.0
SHORTEST_S, LONGEST_S = 60.0, 180.0
SPACE: list[dict[str, Any]] = [
    {
        "name": "rounded",
        "passes": [
            {
                "pass": "gptq",
                "bits": {"choice": [2, 3, 4, 5, 6, 7, 8]},
                "group_size": {"choice": [16, 32, 64, 128]},
                "symmetric": {"choice": [True, False]},
                "damping": {"range": [0.001, 0.5], "log": True},
            }
        ],
        "exports": ["compressed-tensors"],
        "calibration": {"samples": 8, "length": 64},
    }
]


def answer(recipe: dict[str, Any]) -> tuple[float, float]:
    """Size and cosine of a recipe, made up: fewer bits are smaller and worse, and one damping is best."""
    rounding = recipe["passes"][0]
    size = (rounding["bits"] + 16 / rounding["group_size"]) / 32
    return size, 1 - 0.6 / 2 ** rounding["bits"] - 0.0001 * rounding["group_size"] - 0.01 * abs(
        rounding["damping"] - 0.05
    )


@dataclass
class Running:
    claimed: Claimed
    ends: float  #: on the simulated clock


class Fleet:
    """Simulated workers: which jobs run, and the seconds in which a worker had one."""

    def __init__(self, world: StudyWorld, workers: int) -> None:
        self._world = world
        self._workers = workers
        self._random = random.Random(0)
        self.running: list[Running] = []
        self.busy: list[tuple[float, float]] = []  #: start and end of each job

    def until(self, now: float) -> None:
        """Let jobs end and workers claim up to this moment."""
        while (first := min(self.running, key=lambda job: job.ends, default=None)) is not None and first.ends <= now:
            self.running.remove(first)
            self._world.held.append(first.claimed)
            self._world.end(first.claimed, answer)
            self._claim(first.ends)
        for _ in range(self._workers - len(self.running)):
            if not self._claim(now):
                break

    def _claim(self, at: float) -> bool:
        claimed = self._world.store.claims.claim(WorkerOffer("w", "cpu", "cpu", 1 << 40, 1), ttl_s=3600)
        if claimed is None:
            return False
        ends = at + self._random.uniform(SHORTEST_S, LONGEST_S)
        self.running.append(Running(claimed, ends))
        self.busy.append((at, ends))
        return True

    def share_busy(self, start: float, end: float) -> float:
        inside = sum(max(0.0, min(end, stop) - max(start, begin)) for begin, stop in self.busy)
        return inside / (self._workers * (end - start))


@dataclass(frozen=True)
class Step:
    """Milliseconds of a step of the control process."""

    wall: float
    cpu: float
    database: float  #: CPU time of PostgreSQL


def run(world: StudyWorld, study: StudyView, workers: int, server: Postgres) -> list[Figure]:
    fleet, control = Fleet(world, workers), world.replica()
    now, steps, last_full = 0.0, [], 0.0
    while True:
        began, cpu, database = time.perf_counter(), time.thread_time(), database_seconds(server)
        control.advance()
        spent = time.perf_counter() - began, time.thread_time() - cpu, database_seconds(server) - database
        steps.append(Step(*(1000 * seconds for seconds in spent)))
        view = world.get(study)
        if view.state != "searching":
            break
        if view.proposed < view.trials:
            last_full = now
        fleet.until(now)
        now += TICK_S
    return [
        *of_steps("step", [step.wall for step in steps], bar="< 200"),
        *of_steps("CPU of a step", [step.cpu for step in steps]),
        *of_steps("database's CPU of a step", [step.database for step in steps]),
        Figure("busy", 100 * fleet.share_busy(LONGEST_S, max(2 * LONGEST_S, last_full)), "%", bar=">= 95"),
        Figure("simulated hours", now / 3600, "h"),
        Figure("load of the machine", os.getloadavg()[1]),
    ]


def of_steps(name: str, milliseconds: Sequence[float], bar: str = "") -> list[Figure]:
    tenth = max(1, len(milliseconds) // 10)
    early, late = milliseconds[tenth : 2 * tenth], milliseconds[-2 * tenth : -tenth]
    return [
        Figure(f"{name}/p50", statistics.median(milliseconds), "ms"),
        Figure(f"{name}/p99", statistics.quantiles(milliseconds, n=100)[98], "ms", bar=bar),
        Figure(f"{name}/early", statistics.mean(early), "ms"),
        Figure(f"{name}/late", statistics.mean(late), "ms"),
    ]


def database_seconds(server: Postgres) -> float:
    """CPU seconds of the server's processes until now. The kernel counts them in nanoseconds, other than those of `cpu_seconds`."""
    assert server.process is not None
    total = 0
    for process in psutil.Process(server.process.pid).children(recursive=True):
        with suppress(FileNotFoundError):  # it has ended since it was listed
            total += int(Path(f"/proc/{process.pid}/schedstat").read_text().split()[0])
    return total / 1e9


def main() -> int:
    parser = make_parser("studies", __doc__)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=64)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="nightpress-bench-") as folder,
        Postgres(Path(folder) / "postgres", durable=True) as server,
    ):
        url = server.create_database()
        migrations.upgrade(url)
        world = StudyWorld(Path(folder) / "np", url, bert_tiny_dir(Path(folder)), max_queued_jobs=100_000)
        study = world.create(space=SPACE, trials=options.trials, parallel=options.workers)
        figures = run(world, study, options.workers, server)
        world.engine.dispose()
    return finish("studies", figures, parser, options)


if __name__ == "__main__":
    sys.exit(main())
