"""The slot of a worker: it runs one job at a time, and claims the next job as soon as the last has ended."""

import logging
import threading
import time
from collections.abc import Callable

from nightpress.core.errors import NightpressError
from nightpress.core.service.jobs.records import WorkerOffer
from nightpress.core.service.jobs.store import JobStore
from nightpress.core.tracing import record_span
from nightpress.worker.health import mark_alive
from nightpress.worker.metrics import CLAIMS
from nightpress.worker.offer import introduce
from nightpress.worker.supervisor import Supervisor

_BEAT_S = 5.0  #: seconds between heartbeats
_LOOK_S = 5.0  #: seconds between claims of an idle worker without a ring: the broker may be down

log = logging.getLogger(__name__)


class Slot:
    """Claims jobs from SQL and runs them. A ring during a job is dropped, because the slot claims again after the job."""

    def __init__(self, store: JobStore, supervisor: Supervisor, offer: WorkerOffer, *, ttl_s: float) -> None:
        self._store = store
        self._supervisor = supervisor
        self._offer = offer
        self._ttl_s = ttl_s
        self._busy = threading.Lock()
        self._threads = [
            threading.Thread(target=self._every, args=(_BEAT_S, self._beat), name="worker-beat", daemon=True),
            threading.Thread(target=self._every, args=(_LOOK_S, self.serve), name="worker-look", daemon=True),
        ]

    def open(self) -> None:
        """Probe the machine, start the spare child, and begin to send heartbeats and to look for work."""
        self._supervisor.fitness.examine()
        self._supervisor.warm_up()
        for thread in self._threads:
            thread.start()

    def close(self, timeout: float) -> None:
        """Release the running job, claim no other, and remove the worker from the roster. `timeout`: seconds to wait for the job."""
        self._supervisor.draining.set()
        if self._busy.acquire(timeout=timeout):
            self._supervisor.close()
        try:
            self._store.roster.remove_worker(self._offer.worker_id)
        except NightpressError as error:
            log.warning("The worker could not say good-bye: %s", error)

    def serve(self) -> None:
        """Claim and run jobs until there are none left. Returns at once if a job runs already, or the machine is unfit."""
        if not self._busy.acquire(blocking=False):
            return
        try:
            while not self._supervisor.draining.is_set() and not self._supervisor.fitness.reason:
                asked, asked_ns = time.monotonic(), time.time_ns()
                claimed = self._store.claims.claim(self._offer, ttl_s=self._ttl_s)
                if claimed is None:
                    return
                CLAIMS.labels(self._offer.queue).inc()
                about = {"nightpress.job_id": claimed.job.id, "nightpress.worker_id": self._offer.worker_id}
                record_span("claim", asked_ns, attributes=about, parent=claimed.job.traceparent)
                self._supervisor.run(claimed, claimed_at=asked)
        finally:
            self._busy.release()

    def _beat(self) -> None:
        fitness = self._supervisor.fitness
        fitness.probe_again()
        unfit = fitness.reason or None
        self._store.roster.heartbeat_worker(
            introduce(
                self._offer,
                draining=self._supervisor.draining.is_set(),
                unfit=unfit,
                vllm=self._supervisor.settings.vllm_python is not None,
            )
        )
        mark_alive(self._supervisor.settings.data_dir, "worker")

    def _every(self, seconds: float, step: Callable[[], None]) -> None:
        while True:
            try:
                step()
            except NightpressError as error:
                log.warning("%s", error)
            except Exception:
                log.exception("The worker goes on after an unexpected error.")
            if self._supervisor.draining.wait(seconds):
                return
