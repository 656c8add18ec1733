"""An installation in one folder for tests: its settings, its store, jobs to submit, and workers as threads or real processes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil
from pydantic import SecretStr
from sqlalchemy import insert, select

from nightpress.core.artifacts.open import open_store
from nightpress.core.artifacts.storage import ObjectStore
from nightpress.core.database import db_now, make_engine, transaction
from nightpress.core.handoff.manifest import describe_folder, digest_of
from nightpress.core.ids import new_id
from nightpress.core.service.jobs.checkpoints import CheckpointIndex
from nightpress.core.service.jobs.records import Event, Job, NewJob, WorkerOffer
from nightpress.core.service.jobs.ring import RING_TASK, make_celery
from nightpress.core.service.jobs.store import JobStore
from nightpress.core.service.tables.jobs import jobs
from nightpress.core.service.tables.registry import models
from nightpress.core.settings import Settings
from nightpress.worker.cache import BlobCache
from nightpress.worker.folder import WorkerFolder
from nightpress.worker.process import CHILD_COMMAND
from nightpress.worker.slot import Slot
from nightpress.worker.staging import Stager
from nightpress.worker.supervisor import Supervisor
from tests import forked_process
from tests.forked_process import ROOT, Process
from tests.patience import slowness


def module_of(tree: Path, name: str) -> str:
    """The import name of a module of ours in a checkout. Before the second edition, the packages had no `nightpress.` before them."""
    return f"nightpress.{name}" if (tree / "nightpress").is_dir() else name


TENANT = "default"
MIB = 1024**2
RECIPE = {
    "name": "eights",
    "passes": [{"pass": "dynamic-int8"}],
    "exports": ["onnx"],
    "evaluate": [{"metric": "fidelity", "samples": 4, "length": 16}],
}
Answer = TypeVar("Answer")


def behaving(name: str) -> list[str]:
    """The command of a child that runs the function `name` of tests/children.py."""
    return [sys.executable, "-P", str(ROOT / "tests" / "children.py"), name]


def eventually(ask: Callable[[], Answer], *, within: float = 20.0, every: float = 0.05) -> Answer:
    """Call `ask` until its answer is true, and return the answer.

    Raises AssertionError after `within` seconds, multiplied by `slowness()` on a busy machine.
    """
    began = time.monotonic()
    while True:
        answer = ask()
        if answer:
            return answer
        waited = time.monotonic() - began
        assert waited < within * slowness(), f"still {answer!r} after {waited:.1f} s"
        time.sleep(every)


class Service:
    """One installation. It starts without processes; a test starts those that it needs."""

    def __init__(self, folder: Path, sql_url: str, *, broker_url: str = "redis://127.0.0.1:1/0", **more: Any) -> None:
        more = {"lease_ttl_s": 2.0 * slowness(), "tick_s": 0.3, "retry_backoff_s": 0.05, "worker_threads": 1} | more
        self.settings = Settings(
            _env_file=None, data_dir=folder / "np", database_url=sql_url, broker_url=broker_url, **more
        )
        self.settings.data_dir.mkdir(mode=0o700, exist_ok=True)
        self._temporary = folder / "tmp"  # a killed process leaves its temporary files here
        self._temporary.mkdir(exist_ok=True)
        self.engine = make_engine(self.settings.sql_url)
        self.store = JobStore(self.engine)
        self.objects: ObjectStore = open_store(self.settings)
        self.processes: list[Process] = []
        self.model_id, self.model_digest = self._register_model()

    def _register_model(self) -> tuple[str, str]:
        """Register a model of random bytes: the children of most tests only copy it."""
        model_id = new_id("mdl")
        folder = self.settings.data_dir / "upload"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(os.urandom(50_000))
        (folder / "config.json").write_text("{}")
        return self.register(model_id, folder)

    def register(self, model_id: str, folder: Path, *, in_place: bool = False) -> tuple[str, str]:
        """Register a folder as a ready model, with its files copied to storage or left in place. Returns its id and digest."""
        files = describe_folder(folder)
        if not in_place:
            for file in files:
                self.objects.put_file(f"models/{model_id}/{file.path}", folder / file.path, sha256=file.sha256)
        values = {
            "id": model_id,
            "tenant_id": TENANT,
            "name": "m",
            "state": "ready",
            "source": "path" if in_place else "upload",
            "server_path": str(folder) if in_place else None,
            "digest": digest_of(files),
            "size": sum(file.size for file in files),
            "parameters": 1,
            "files": [file.model_dump() for file in files],
            "created_at": db_now(),
        }
        with transaction(self.engine) as connection:
            connection.execute(insert(models).values(values))
        return model_id, digest_of(files)

    def submit(self, recipe: dict[str, Any] | None = None, **more: Any) -> str:
        new = {"queue": "cpu", "run_limit_s": 600.0, "stall_s": 30.0, "max_failures": 2, "needs_memory": 1} | more
        job, _ = self.store.submission.submit(
            NewJob(
                tenant_id=more.pop("tenant_id", TENANT),
                model_id=self.model_id,
                model_name="m",
                model_digest=self.model_digest,
                recipe=recipe or RECIPE,
                **{key: value for key, value in new.items() if key != "tenant_id"},
            ),
            max_queued=1000,
        )
        return job.id

    def ring(self) -> None:
        """Wake an idle worker, as the API does after a submission. Without this, the worker looks for jobs every five seconds."""
        app = make_celery(self.settings)
        app.send_task(RING_TASK, args=["cpu"], queue="cpu")
        app.close()

    def submit_and_ring(self, **more: Any) -> str:
        job_id = self.submit(**more)
        self.ring()
        return job_id

    # Reading ---------------------------------------------------------------------------------------------------------

    def job(self, job_id: str, tenant_id: str = TENANT) -> Job:
        job = self.store.reader.get(tenant_id, job_id)
        assert job is not None
        return job

    def events(self, job_id: str) -> list[Event]:
        return self.store.reader.events(job_id)

    def kinds(self, job_id: str) -> list[str]:
        return [event.kind for event in self.events(job_id)]

    def log(self, job_id: str) -> str:
        return "\n".join(line.text for line in self.store.reader.logs(job_id))

    def running(self) -> list[str]:
        """The ids of the jobs of all tenants that a worker holds."""
        with transaction(self.engine, read_only=True) as connection:
            return list(connection.execute(select(jobs.c.id).where(jobs.c.lease_id.is_not(None))).scalars())

    def unfinished(self) -> list[str]:
        """The ids of the jobs of all tenants that have not ended."""
        with transaction(self.engine, read_only=True) as connection:
            return list(connection.execute(select(jobs.c.id).where(jobs.c.finished_at.is_(None))).scalars())

    def await_state(self, job_id: str, *states: str, within: float = 20.0) -> Job:
        def reached() -> Job | None:
            job = self.job(job_id)
            return job if job.state in states else None

        return eventually(reached, within=within)

    def await_log(self, job_id: str, text: str, within: float = 20.0) -> str:
        return eventually(
            lambda: next((splitline for splitline in self.log(job_id).splitlines() if text in splitline), ""),
            within=within,
        )

    def check_invariants(self, job_id: str, tenant_id: str = TENANT) -> None:
        """Check that an ended job is consistent.

        It has exactly one end and a history without gaps. All files of its artifacts are in storage with the right SHA-256, and there
        are artifacts only if it succeeded. It has no more failures than allowed, and workers have removed its results from their folders.
        """
        job, events = self.job(job_id, tenant_id), self.events(job_id)
        assert job.state in {"succeeded", "failed", "cancelled"}
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        assert [event.kind for event in events if event.kind in {"succeeded", "failed", "cancelled"}] == [job.state]
        assert job.failures <= job.max_failures
        artifacts = self.store.reader.artifacts(job_id)
        assert bool(artifacts) == (job.state == "succeeded")
        for artifact in artifacts:
            for file in artifact.files:
                key = f"jobs/{job.reused_from or job_id}/attempts/{artifact.attempt}/{artifact.path}/{file['path']}"
                self.objects.get_file(key, self.settings.data_dir / "check", sha256=file["sha256"])
        # A worker removes the result's folder shortly after the commit.
        eventually(lambda: not self._results_left(), within=5)

    def _results_left(self) -> list[str]:
        """Result folders with files that workers have not removed yet. Workers may remove some during the search."""
        walk = os.walk(self.settings.data_dir / "work")
        return [folder for folder, folders, files in walk if Path(folder).name == "out" and (folders or files)]

    # Workers ---------------------------------------------------------------------------------------------------------

    def slot(self, behaviour: str | None, *, memory: int = 1024 * MIB, spare: bool = False) -> tuple[Slot, Supervisor]:
        """A worker's slot in this process. `behaviour`: a function of tests/children.py; None: the real child."""
        worker_id = new_id("wkr")
        settings = self.settings.model_copy(update={"worker_spare": spare})
        offer = WorkerOffer(worker_id, "cpu", "cpu", memory, 1)
        cache = BlobCache(settings.data_dir / "cache", settings.cache_bytes)
        supervisor = Supervisor(
            settings,
            self.store,
            self.objects,
            Stager(self.engine, self.objects, cache),
            CheckpointIndex(self.engine),
            WorkerFolder(settings.data_dir / "work", worker_id).path,
            threads=1,
            child_command=behaving(behaviour) if behaviour else CHILD_COMMAND,
        )
        return Slot(self.store, supervisor, offer, ttl_s=settings.lease_ttl_s), supervisor

    def environment(self) -> dict[str, str]:
        """The environment of a process of this installation."""
        told = self.settings.model_dump(mode="json", exclude_defaults=True, exclude={"data_dir"})
        secrets = {name for name in told if isinstance(getattr(self.settings, name), SecretStr)}
        told |= {name: getattr(self.settings, name).get_secret_value() for name in secrets}
        env = {
            f"NIGHTPRESS_{name.upper()}": json.dumps(value) if isinstance(value, list) else str(value)
            for name, value in told.items()
        }
        own = {
            "NIGHTPRESS_DATA_DIR": str(self.settings.data_dir),
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(self._temporary),
        }
        return {**os.environ, **env, **own}

    def start(self, *command: str, through: Sequence[str] = (), cwd: Path = ROOT, **more: str) -> Process:
        """Start Python with arguments as a process of this installation. Its output goes to processes.log in the data folder.

        `through`: a command that runs the process.
        """
        environment = self.environment() | more
        with (self.settings.data_dir / "processes.log").open("ab") as log:
            process = forked_process.start(command, environment=environment, cwd=cwd, log=log, through=through)
        self.processes.append(process)
        return process

    def start_worker(self, behaviour: str | None = "press", *, through: Sequence[str] = (), **more: str) -> Process:
        before = len(self.store.roster.workers())
        script = ("tests/worker_process.py", behaviour) if behaviour else ("-m", "nightpress.worker")
        process = self.start(*script, through=through, **more)
        eventually(lambda: len(self.store.roster.workers()) > before or process.poll() is not None, within=60)
        assert process.poll() is None, self.output()
        return process

    def start_control(self, clock_wrong_by: str = "") -> Process:
        if clock_wrong_by:
            return self.start("tests/control_process.py", NIGHTPRESS_TEST_CLOCK=clock_wrong_by)
        return self.start("-m", "nightpress.worker.control")

    def output(self) -> str:
        return (self.settings.data_dir / "processes.log").read_text(errors="replace")

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.terminate()
        for process in self.processes:
            try:
                process.wait(15 * slowness())
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.engine.dispose()


def pids_said(line: str) -> list[int]:
    """The process ids, in the test's own namespace, of the processes in a log line such as `pid 12 consumer 13 in pid:[402]`.

    The line has their ids in the child's PID namespace. Processes that have ended are left out.
    """
    inside = [int(word) for word in line.split() if word.isdigit()]
    namespace = line.split()[-1]
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(OSError):
            if str(Path(f"/proc/{process.pid}/ns/pid").readlink()) == namespace:
                status = Path(f"/proc/{process.pid}/status").read_text()
                numbers = next(row for row in status.splitlines() if row.startswith("NSpid:")).split()
                found[int(numbers[-1])] = process.pid
    return [found[pid] for pid in inside if pid in found]


def running(pids: list[int]) -> list[int]:
    """The processes that still run. A zombie, which has ended but was not waited for, does not count."""
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
    return found


def load_json(line: str) -> dict[str, str]:
    found: dict[str, str] = json.loads(line)
    return found
