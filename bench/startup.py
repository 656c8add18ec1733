"""The time that a job, a worker and the API take to start, and the memory of an idle service.

    python -m bench.startup [--jobs 10]

- From submission to running: from before the POST until the database shows the child's first phase; with a spare child, and without one.
- Worker ready: from the start of the process until it is registered and receives rings, beside a bare Celery worker.
- Import: `nightpress.api.app`, beside the libraries that it needs.
- Memory: proportional set size (a shared page is counted only once in the sum), resident set size, and anonymous memory.
"""

import json
import os
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from bench.processes import run_python
from bench.record import Figure, finish, make_parser
from nightpress.core.settings import Settings
from tests.models import bert_tiny_dir
from tests.servers import free_port

RECIPE = {
    "name": "half",
    "passes": [{"pass": "magnitude", "sparsity": 0.5}],
    "exports": ["safetensors"],
    "evaluate": [{"metric": "fidelity", "samples": 4, "length": 16}],
}
BARE_CELERY = """
import sys
from celery import Celery, signals
app = Celery(broker=sys.argv[1])
app.conf.update(worker_redirect_stdouts=False, broker_connection_retry_on_startup=True)
signals.worker_ready.connect(lambda **_: print("ready", flush=True), weak=False)
app.Worker(pool="threads", concurrency=1, queues=["bare"], quiet=True, without_gossip=True, without_mingle=True).start()
"""


class Stack:
    """The embedded stack in its own folder, and a client for it."""

    def __init__(self, folder: Path, models: Path, *, spare: bool) -> None:
        self.folder = folder
        self.url = f"http://127.0.0.1:{free_port()}"
        env = {name: value for name, value in os.environ.items() if not name.startswith("NIGHTPRESS_")}
        env |= {
            "NIGHTPRESS_DATA_DIR": str(folder),
            "NIGHTPRESS_API_PORT": self.url.rsplit(":", 1)[1],
            "NIGHTPRESS_MODEL_ROOTS": json.dumps([str(models)]),
            "NIGHTPRESS_WORKER_SPARE": str(spare),
        }
        self.env = env
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nightpress.worker.devstack"], env=env, stdout=subprocess.DEVNULL
        )
        self._wait(lambda: self.client().get("/v1/workers").json()["items"], 90)
        self.http = self.client()
        answer = self.http.post("/v1/models", json={"name": "bert-tiny", "path": str(next(models.iterdir()))})
        answer.raise_for_status()

    def client(self) -> httpx.Client:
        key = (self.folder / "key").read_text().strip()
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {key}"}, timeout=30)

    def _wait(self, ask: Any, seconds: float) -> Any:
        deadline = time.monotonic() + seconds
        while True:
            try:
                if answer := ask():
                    return answer
            except (httpx.HTTPError, OSError, KeyError):
                pass
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise RuntimeError("the stack did not come up")
            time.sleep(0.1)

    def processes(self) -> dict[str, list[psutil.Process]]:
        """The processes of `api`, `worker` and `control`, and those of the worker's `spare` child: it imports in processes of its own."""
        pids = json.loads((self.folder / "devstack.json").read_text())["pids"]
        found = {name: [psutil.Process(pids[name])] for name in ("api", "worker", "control")}
        return found | {"spare": found["worker"][0].children(recursive=True)}

    def settle(self) -> None:
        """Wait until all processes are idle, so that all imports are done; at most 60 s, because on a busy machine they never are."""
        for _ in range(60):
            before = self._cpu()
            time.sleep(1.0)
            if self._cpu() - before < 0.06:
                return

    def _cpu(self) -> float:
        found = [process for some in self.processes().values() for process in some]
        return sum(sum(process.cpu_times()[:2]) for process in found)

    def submit_and_watch(self) -> float:
        """Seconds from before the POST until the child has reported a phase. The job is then cancelled."""
        with sqlite3.connect(self.folder / "nightpress.db") as database:
            started = time.perf_counter()
            job_id = self.http.post("/v1/jobs", json={"model": "bert-tiny", "recipe": RECIPE}).json()["id"]
            query = "SELECT phase, state FROM jobs WHERE id = ?"
            while (row := database.execute(query, (job_id,)).fetchone())[0] in {None, "fetching"}:
                if row[1] in {"failed", "succeeded"}:
                    raise RuntimeError(self.http.get(f"/v1/jobs/{job_id}").text)
                time.sleep(0.002)
            taken = time.perf_counter() - started
            self.http.post(f"/v1/jobs/{job_id}/cancel")
            while database.execute(query, (job_id,)).fetchone()[1] not in {"cancelled", "succeeded", "failed"}:
                time.sleep(0.05)
        return taken

    def worker_ready(self) -> float:
        """Seconds until a second worker receives rings."""
        started = time.perf_counter()
        command = [sys.executable, "-m", "nightpress.worker"]
        process = subprocess.Popen(command, env=self.env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        return _seconds_until(process, process.stderr, "ready", started)

    def bare_ready(self) -> float:
        started = time.perf_counter()
        command = [sys.executable, "-c", BARE_CELERY, Settings(data_dir=self.folder).celery_url]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        return _seconds_until(process, process.stdout, "ready", started)


def _seconds_until(process: "subprocess.Popen[str]", stream: Any, word: str, started: float) -> float:
    for line in stream:
        if word in line:
            break
    taken = time.perf_counter() - started
    process.terminate()
    stream.read()
    process.wait(30)
    return taken


@contextmanager
def running(models: Path, *, spare: bool) -> Iterator[Stack]:
    folder = Path(tempfile.mkdtemp(prefix="np-"))
    stack = Stack(folder / "d", models, spare=spare)
    try:
        stack.settle()
        yield stack
    finally:
        stack.process.terminate()
        stack.process.wait(60)
        shutil.rmtree(folder)


def memory_of(processes: dict[str, list[psutil.Process]]) -> dict[str, dict[str, float]]:
    """Name → kind of memory → MB, summed over the processes of that name."""
    found = {}
    for name, some in processes.items():
        full = [process.memory_full_info() for process in some]
        sizes = {
            "pss": sum(info.pss for info in full),
            "rss": sum(info.rss for info in full),
            "anonymous": sum(row.anonymous for process in some for row in process.memory_maps()),
        }
        found[name] = {kind: round(size / 1e6, 1) for kind, size in sizes.items()}
    return found


def total(memory: dict[str, dict[str, float]], kind: str, *, spare: bool) -> float:
    return round(sum(sizes[kind] for name, sizes in memory.items() if spare or name != "spare"), 1)


def import_seconds(what: str) -> list[float]:
    code = f"import sys, time; t = time.perf_counter(); {what}; print(time.perf_counter() - t); assert 'torch' not in sys.modules"
    return [round(float(run_python("-c", code)), 2) for _ in range(5)]


def measure(jobs: int) -> list[Figure]:
    models = Path(tempfile.mkdtemp(prefix="np-models-")).resolve()
    bert_tiny_dir(models)
    warm, cold = [], []
    with running(models, spare=True) as stack:
        memory = memory_of(stack.processes())
        for _ in range(jobs):
            stack.settle()
            warm.append(stack.submit_and_watch())
        ready = [(stack.worker_ready(), stack.bare_ready()) for _ in range(3)]
    with running(models, spare=False) as stack:
        for _ in range(max(2, jobs // 3)):
            stack.settle()
            cold.append(stack.submit_and_watch())
    shutil.rmtree(models)
    imports = {
        "ours": import_seconds("import nightpress.api.app"),
        "libraries": import_seconds("import fastapi, sqlalchemy, celery"),
    }
    median = statistics.median
    return [
        Figure("submit to running/warm", round(1000 * median(warm)), "ms", _milliseconds(warm), "< 300"),
        Figure("submit to running/without a spare", round(1000 * median(cold)), "ms", _milliseconds(cold)),
        Figure("worker ready/ours", round(median(ours for ours, _ in ready), 1), "s", bar="< 3"),
        Figure("worker ready/bare Celery", round(median(bare for _, bare in ready), 1), "s"),
        Figure("import/ours", median(imports["ours"]), "s", _ends(imports["ours"]), "< 1"),
        Figure("import/libraries", median(imports["libraries"]), "s", _ends(imports["libraries"])),
        Figure("idle memory/services", total(memory, "pss", spare=False), "MB, proportional", bar="< 400"),
        Figure("idle memory/with the spare", total(memory, "pss", spare=True), "MB, proportional"),
        *(
            Figure(f"memory of {name}/{kind}", size, "MB")
            for name, sizes in memory.items()
            for kind, size in sizes.items()
        ),
    ]


def _ends(values: list[float]) -> tuple[float, float]:
    return min(values), max(values)


def _milliseconds(seconds: list[float]) -> tuple[float, float]:
    return round(1000 * min(seconds)), round(1000 * max(seconds))


def main() -> int:
    parser = make_parser("startup", __doc__)
    parser.add_argument("--jobs", type=int, default=10)
    options = parser.parse_args()
    return finish("startup", measure(options.jobs), parser, options)


if __name__ == "__main__":
    sys.exit(main())
