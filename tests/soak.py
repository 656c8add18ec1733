"""`python -m tests.soak`: causes random faults in a whole installation, and checks the invariants at the end.

Three tenants submit jobs at random times. Meanwhile workers, children and servers are killed, workers and servers are frozen, workers are
drained, the broker is flushed, the database is locked, a control process gets a wrong clock, and jobs are cancelled. Half of the faults
come two at once. The seed is printed first; CHAOS_SEED repeats the same faults. Studies run among the jobs: each must end with the trials
and the winner of the same study without faults. The invariants:

I1 every accepted job reaches an end · I2 exactly one end · I3 its manifest is committed once and every SHA-256 is right · I4 no job has
more failures than allowed · I5 two children of one job live together for at most a lease and the grace of a kill · I6 histories have no
gaps.
"""

import argparse
import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import psycopg

from nightpress import migrations
from nightpress.core.handoff.spec import JobSpec
from nightpress.core.service.jobs.ring import make_celery
from tests.servers import S3, Postgres, Valkey
from tests.service import TENANT, Service
from tests.soak_studies import SoakStudies

TENANTS = ("one", "two", "three")
WORKERS = 3
GRACE_S = 4.0  #: seconds that a kill may take
RECIPE = {"name": "chaos", "passes": [{"pass": "magnitude"}], "exports": ["safetensors"]}
_ALONE = 0.5  #: probability that a fault comes alone; otherwise two come at once
BACKLOG = 30  #: most unfinished jobs before a submission: this keeps a fast machine busy, and a slow one ends soon after the faults
QUIET_S = 60.0  #: after the faults, a job must end at least once in this time


class Soak:
    """One run of random faults. `run` raises AssertionError if an invariant does not hold."""

    def __init__(self, folder: Path, stack: str, seed: int, say: Callable[[str], None]) -> None:
        self._folder, self._stack, self._say = folder, stack, say
        self._seeds = random.Random(seed)
        self._jobs: dict[str, str] = {}  #: job → tenant
        self._faults: Counter[str] = Counter()
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._dices = threading.local()
        self._overlaps: dict[str, float] = {}
        self.violations: list[str] = []

    def run(self, seconds: float) -> None:
        with contextlib.ExitStack() as servers:
            self._broker = servers.enter_context(Valkey(self._folder / "valkey"))
            self._servers: dict[str, Postgres | S3 | Valkey] = {"the broker": self._broker}
            self._service = self._open(servers)
            servers.callback(self._service.close)
            self._studies = SoakStudies(self._service, self._folder)
            self._workers = [self._start_worker() for _ in range(WORKERS)]
            self._controls = [self._service.start_control() for _ in range(2)]
            stop = threading.Event()
            watch = threading.Thread(target=self._watch_children, args=(stop,), daemon=True)
            watch.start()
            self._studies.begin()
            self._cause_chaos(time.monotonic() + seconds)
            self._let_it_settle()
            stop.set()
            watch.join()
            self._check()

    def _open(self, servers: contextlib.ExitStack) -> Service:
        more = {
            "checkpoint_after_s": 0.0,
            "max_queued_jobs": 100_000,
            "max_failures": 20,
            "model_roots": [self._folder],
        }
        if self._stack == "embedded":
            url = f"sqlite:///{self._folder / 'nightpress.db'}"
            storage = {"storage_url": str(self._folder / "objects")}
        else:
            database = servers.enter_context(Postgres(self._folder / "postgres", durable=True))
            objects = servers.enter_context(S3(self._folder / "s3"))
            self._servers |= {"the database": database, "the object store": objects}
            url = database.create_database()
            storage = {
                "storage_url": f"s3://{objects.create_bucket()}",
                "s3_endpoint_url": objects.endpoint,
                "s3_access_key_id": objects.access_key,
                "s3_secret_access_key": objects.secret_key,
            }
        migrations.upgrade(url)
        return Service(self._folder, url, broker_url=self._broker.url, **more, **storage)

    def _start_worker(self) -> "subprocess.Popen[bytes]":
        return self._service.start("tests/worker_process.py", "chaotic")

    # Chaos -------------------------------------------------------------------------------------------------------------

    def _cause_chaos(self, until: float) -> None:
        faults: list[tuple[Callable[[], None], int]] = [
            (self._submit, 30),
            (self._kill_worker, 6),
            (self._drain_worker, 4),
            (self._freeze_worker, 4),
            (self._kill_child, 8),
            (self._cancel, 8),
            (self._flush_broker, 4),
            (self._ring_wildly, 4),
            (self._restart_control, 3),
            (self._restart_server, 2),
            (self._freeze_server, 2),
            (self._lock_database, 2),
            (self._skew_control, 3),
            (self._begin_study, 6),
        ]
        steps, weights = zip(*faults, strict=True)
        while time.monotonic() < until:
            pair = self._seeds.choices(steps, weights, k=2)
            at_once = pair[: 1 if self._seeds.random() < _ALONE else 2]
            threads = [threading.Thread(target=self._cause, args=(step, self._seeds.random())) for step in at_once]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            time.sleep(self._seeds.uniform(0.05, 0.5))

    @property
    def _dice(self) -> random.Random:
        """The random generator of this thread's fault. Each fault has its own, so the order of two faults changes no random number."""
        dice: random.Random = self._dices.of_this_fault
        return dice

    def _cause(self, step: Callable[[], None], seed: float) -> None:
        self._dices.of_this_fault = random.Random(seed)
        name = step.__name__.strip("_").replace("_", " ")
        with self._locks[
            name.split()[-1]
        ]:  # faults with the same last word in their name, such as "worker", run one after the other
            try:
                step()
            except Exception as error:  # a fault may also hit this client, which would try again
                self._say(f"{name}: {error!s:.120}")
            self._faults[name] += 1

    def _submit(self) -> None:
        if len(self._service.unfinished()) > BACKLOG:
            return
        for _ in range(self._dice.randint(1, 3)):
            tenant = self._dice.choice(TENANTS)
            limits = {"max_failures": self._dice.randint(1, 4), "priority": self._dice.randint(-1, 1), "stall_s": 20.0}
            self._jobs[self._service.submit(RECIPE, tenant_id=tenant, **limits)] = tenant

    def _begin_study(self) -> None:
        self._studies.begin()

    def _some_worker(self) -> int:
        return self._dice.randrange(WORKERS)

    def _kill_worker(self) -> None:
        at = self._some_worker()
        self._workers[at].kill()
        self._workers[at].wait()
        self._workers[at] = self._start_worker()

    def _drain_worker(self) -> None:
        at = self._some_worker()
        self._workers[at].terminate()
        self._workers[at] = self._start_worker()  # while the old worker still drains, as in a rolling deploy

    def _freeze_worker(self) -> None:
        """Freeze a worker for a time between 0.2 s and two leases."""
        worker = self._workers[self._some_worker()]
        seconds = self._dice.uniform(0.2, 2.0 * self._service.settings.lease_ttl_s)
        worker.send_signal(signal.SIGSTOP)
        threading.Timer(seconds, self._wake, [worker]).start()

    @staticmethod
    def _wake(worker: "subprocess.Popen[bytes]") -> None:
        with contextlib.suppress(OSError):
            worker.send_signal(signal.SIGCONT)

    def _kill_child(self) -> None:
        if children := sorted(self._children()):
            os.kill(self._dice.choice(children)[0], signal.SIGKILL)

    def _cancel(self) -> None:
        if self._jobs:
            job_id = self._dice.choice(list(self._jobs))
            self._service.store.requests.request_cancel(self._jobs[job_id], job_id)

    def _flush_broker(self) -> None:
        self._broker.flush()

    def _ring_wildly(self) -> None:
        app = make_celery(self._service.settings)
        for queue in self._dice.choices(("cpu", "gpu", "nonsense"), k=5):
            app.send_task("nightpress.ring", args=[queue], queue="cpu")
        app.close()

    def _restart_control(self) -> None:
        self._controls[0].kill()
        self._controls[0].wait()
        self._controls[0] = self._service.start_control()

    def _restart_server(self) -> None:
        name = self._dice.choice(sorted(self._servers))
        server = self._servers[name]
        self._say(f"{name} is killed and started again")
        server.kill()
        time.sleep(self._dice.uniform(0.0, 1.0))
        server.start()

    def _freeze_server(self) -> None:
        """Freeze a server for up to three seconds: clients can connect, but get no answer."""
        server = self._servers[self._dice.choice(sorted(self._servers))]
        server.freeze()
        time.sleep(self._dice.uniform(0.2, 3.0))
        server.thaw()

    def _lock_database(self) -> None:
        """Lock the jobs for up to three seconds: every write of a job waits, as for a long ALTER or VACUUM."""
        url = self._service.settings.sql_url
        seconds = self._dice.uniform(0.2, 3.0)
        if self._stack == "embedded":
            with contextlib.closing(sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)) as holder:
                holder.execute("BEGIN IMMEDIATE")
                time.sleep(seconds)
            return
        with psycopg.connect(url, connect_timeout=2) as connection:
            connection.execute("LOCK TABLE jobs IN EXCLUSIVE MODE")
            time.sleep(seconds)
            connection.rollback()

    def _skew_control(self) -> None:
        """Restart the second control process with a clock that is one hour wrong."""
        self._controls[1].kill()
        self._controls[1].wait()
        self._controls[1] = self._service.start_control(self._dice.choice(("3600", "-3600")))

    # Watching and judging ----------------------------------------------------------------------------------------------

    def _children(self) -> Iterator[tuple[int, str]]:
        """The process id and job id of every child that works on a job. Only the leader of a child's process group counts."""
        for process in psutil.process_iter(["pid", "cmdline", "status"]):
            command = process.info["cmdline"] or []
            if "--frames" in command and str(self._folder) in command[-1] and process.info["status"] != "zombie":
                with contextlib.suppress(OSError, ValueError):
                    if os.getpgid(process.pid) != process.pid:
                        continue
                    yield process.pid, JobSpec.load(Path(command[-1])).job_id

    def _watch_children(self, stop: threading.Event) -> None:
        allowed = self._service.settings.lease_ttl_s + GRACE_S
        while not stop.wait(0.5):
            counts = Counter(job_id for _, job_id in self._children())
            twice = {job_id for job_id, count in counts.items() if count > 1}
            self._overlaps = {job_id: self._overlaps.get(job_id, time.monotonic()) for job_id in twice}
            for job_id, since in self._overlaps.items():
                if time.monotonic() - since > allowed:
                    self.violations.append(f"I5: two children of {job_id} lived together for more than {allowed} s")

    def _let_it_settle(self) -> None:
        """Wait without faults until every accepted job and study has ended. Notes a violation if nothing ends for QUIET_S."""
        for worker in self._service.processes:
            self._wake(worker)
        for worker in self._workers:
            if worker.poll() is not None:
                self._start_worker()
        self._say(f"{len(self._jobs)} jobs, {sum(self._faults.values())} events; waiting for the last ends")
        left, moved = self._left(), time.monotonic()
        while left and time.monotonic() - moved < QUIET_S:
            time.sleep(0.5)
            before, left = left, self._left()
            moved = moved if left == before else time.monotonic()
        if left:
            self.violations.append(f"I1: nothing ended for {QUIET_S:g} s, and {len(left)} have not: {left[:5]}")

    def _left(self) -> list[str]:
        """The jobs and the studies that have not ended."""
        return [*self._service.unfinished(), *self._studies.left()]

    def _check(self) -> None:
        self._start_worker()  # a new worker first removes the files of killed workers
        ends: Counter[str] = Counter()
        self.violations += self._studies.violations()
        trials = dict.fromkeys(self._studies.trial_jobs(), TENANT)
        self._say(f"{len(trials)} trials of studies")
        for job_id, tenant in (self._jobs | trials).items():
            job = self._service.store.reader.get(tenant, job_id)
            if job is None:
                self.violations.append(f"I1: {job_id} was accepted and is gone")
                continue
            ends[job.state] += 1
            try:
                self._service.check_invariants(job_id, tenant)
            except AssertionError as error:
                self.violations.append(f"{job_id} ({job.state}): {error!s:.300}")
        said = ", ".join(f"{count} {state}" for state, count in sorted(ends.items()))
        resumed = sum("resumed" in self._service.kinds(job_id) for job_id in self._jobs)
        self._say(f"{said}; {resumed} went on from an earlier attempt's work")
        self._say(", ".join(f"{count} × {name}" for name, count in self._faults.most_common()))
        if not ends["succeeded"]:
            self.violations.append("nothing succeeded: chaos on an installation that does not work shows nothing")
        assert not self.violations, "\n".join(self.violations)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--stack", choices=("embedded", "production"), action="append", help="both, if none is named")
    options = parser.parse_args()
    seed = int(os.environ.get("CHAOS_SEED") or random.SystemRandom().randrange(10**6))
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:7.1f} s  {text}", flush=True)  # noqa: T201

    failed = 0
    for stack in options.stack or ("embedded", "production"):
        say(f"{stack}: CHAOS_SEED={seed}")
        with tempfile.TemporaryDirectory(prefix="nightpress-soak-", ignore_cleanup_errors=True) as folder:
            try:
                Soak(Path(folder), stack, seed, say).run(60 * options.minutes)
                say(f"{stack}: zero violations")
            except AssertionError as error:
                failed = 1
                log = Path(folder, "np", "processes.log")
                kept = Path(tempfile.gettempdir()) / f"nightpress-soak-{seed}.log"
                kept.write_bytes(log.read_bytes() if log.exists() else b"")
                say(f"{stack}: VIOLATED\n{error}\nThe processes' log is {kept}.")
    return failed


if __name__ == "__main__":
    sys.exit(main())
