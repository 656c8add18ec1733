"""The slot of a worker: it runs as many jobs at a time as its host has shares, and claims the next job as soon as one has ended."""

import logging
import threading
import time
from collections.abc import Callable

from nightpress.core.errors import NightpressError
from nightpress.core.service.jobs.records import Claimed, WorkerOffer
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
    """Claims jobs from SQL and runs each in a thread, as many at a time as the offer has shares.

    Only one thread claims. It claims until there is no job for what is free, and again after a job has ended. While all shares are in use,
    it waits, and other rings come to nothing.
    """

    def __init__(self, store: JobStore, supervisor: Supervisor, offer: WorkerOffer, *, ttl_s: float) -> None:
        self._store = store
        self._supervisor = supervisor
        self._offer = offer
        self._ttl_s = ttl_s
        self._changed = threading.Condition()
        self._free = offer.shares
        #: UUIDs of the GPUs of jobs that run, also of a job that has lost its lease and is about to end
        self._gpus_in_use: frozenset[str] = frozenset()
        self._claiming = False
        self._claim_again = False  #: a ring came, or a job ended, since the last claim was sent
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
        """Release the running jobs, claim no other, and remove the worker from the roster. `timeout`: seconds to wait for the jobs."""
        self._supervisor.draining.set()
        with self._changed:
            self._changed.notify_all()
            if self._changed.wait_for(lambda: self._free == self._offer.shares and not self._claiming, timeout=timeout):
                self._supervisor.close()
        try:
            self._store.roster.remove_worker(self._offer.worker_id)
        except NightpressError as error:
            log.warning("The worker could not say good-bye: %s", error)

    def serve(self) -> None:
        """Claim and start jobs until there is none left for what is free. Returns at once if another thread does, or the machine is unfit.

        Does not return while all shares are in use: a busy worker must not take the broker's messages from idle ones.
        """
        with self._changed:
            self._claim_again = True
            if self._claiming:
                return
            self._claiming = True
        try:
            while self._may_claim():
                asked, asked_ns = time.monotonic(), time.time_ns()
                claimed = self._store.claims.claim(self._offer, ttl_s=self._ttl_s, in_use=self._gpus_in_use)
                if claimed is not None:
                    self._start(claimed, asked, asked_ns)
        except BaseException:
            with self._changed:
                self._claiming = False
                self._changed.notify_all()
            raise

    def _may_claim(self) -> bool:
        """Wait until a share is free. False: claiming is over, because there is nothing to claim, or the worker must not."""
        draining = self._supervisor.draining
        with self._changed:
            self._changed.wait_for(lambda: self._free > 0 or draining.is_set())
            self._claiming = self._claim_again and not draining.is_set() and not self._supervisor.fitness.reason
            self._claim_again = False
            self._changed.notify_all()
            return self._claiming

    def _start(self, claimed: Claimed, asked: float, asked_ns: int) -> None:
        CLAIMS.labels(claimed.job.queue).inc()
        about = {"nightpress.job_id": claimed.job.id, "nightpress.worker_id": self._offer.worker_id}
        record_span("claim", asked_ns, attributes=about, parent=claimed.job.traceparent)
        with self._changed:
            self._free -= claimed.share.size
            self._gpus_in_use |= {gpu.uuid for gpu in claimed.share.gpus}
            self._claim_again = True
        threading.Thread(target=self._run, args=(claimed, asked), name=f"job-{claimed.job.id}", daemon=True).start()

    def _run(self, claimed: Claimed, asked: float) -> None:
        try:
            self._supervisor.run(claimed, claimed_at=asked)
        except Exception:
            log.exception("The worker goes on after an unexpected error.")
        with self._changed:
            self._free += claimed.share.size
            self._gpus_in_use -= {gpu.uuid for gpu in claimed.share.gpus}
            self._claim_again = True
            nobody_claims = not self._claiming
            self._changed.notify_all()
        if nobody_claims:
            self._guarded(self.serve)

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
            self._guarded(step)
            if self._supervisor.draining.wait(seconds):
                return

    def _guarded(self, step: Callable[[], None]) -> None:
        try:
            step()
        except NightpressError as error:
            log.warning("%s", error)
        except Exception:
            log.exception("The worker goes on after an unexpected error.")
