"""The supervisor: runs a claimed job in a child process, from staging its files to committing its result.

Every wait, including waits for the object store, checks what may end a job from outside: a lost lease, cancellation, drain, limits.
After the child is dead, one guarded statement writes how the attempt ended.
"""

import contextlib
import logging
import random
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, TypeVar

from nightpress.core.artifacts.storage import ObjectStore
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.frames import Phase
from nightpress.core.handoff.spec import JobSpec
from nightpress.core.logs import log_context
from nightpress.core.recipes.models import Recipe
from nightpress.core.recipes.passes import catalog
from nightpress.core.service.jobs.checkpoints import CheckpointIndex
from nightpress.core.service.jobs.records import Claimed, Job
from nightpress.core.service.jobs.store import JobStore
from nightpress.core.settings import Settings
from nightpress.core.tracing import span
from nightpress.worker import sandbox
from nightpress.worker.cache import full_worker_disk
from nightpress.worker.checkpoints import CheckpointDepot
from nightpress.worker.fitness import Fitness, MachineFaultError
from nightpress.worker.lease import LeaseKeeper
from nightpress.worker.meter import Meter
from nightpress.worker.metrics import ATTEMPTS, GPU_SECONDS, LEASES_LOST
from nightpress.worker.process import CHILD_COMMAND, ChildProcess
from nightpress.worker.recipes import read_recipe
from nightpress.worker.relay import Relay
from nightpress.worker.sources import SourceKeeper
from nightpress.worker.staging import Stager, files_of, outcome_of, read_manifest, ship
from nightpress.worker.storage_threads import StorageThreads

#: the job's progress, 0 to 1, after fetching the source and before uploading the result
FETCHED: Final = 0.03
PRESSED: Final = 0.97

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")


class LeaseLostError(Exception):
    """Another worker may have the job by now, so nothing may be written."""


class CancelledError(Exception):
    """A user has cancelled the job."""


class DrainedError(Exception):
    """This worker shuts down, so the job is released."""


class Supervisor:
    """Runs claimed jobs; `run` may be called in several threads. `child_command` starts a child; its options and folder are appended."""

    def __init__(
        self,
        settings: Settings,
        store: JobStore,
        objects: ObjectStore,
        stager: Stager,
        checkpoints: CheckpointIndex,
        root: Path,
        *,
        threads: int,
        child_command: Sequence[str] = CHILD_COMMAND,
    ) -> None:
        """threads: CPU threads of a job with one share of the host; the spare child has as many."""
        self.settings = settings
        self.store = store
        self.objects = objects
        self.stager = stager
        self.checkpoints = checkpoints
        self._root = root
        self._threads = threads
        self._child_command = child_command
        self._children = threading.Lock()
        self._spare: ChildProcess | None = None
        self._folders: set[Path] = set()  #: of children that are in use
        self.draining = threading.Event()
        self.storage_threads = StorageThreads()
        self.fitness = Fitness(settings, objects)

    # The spare -------------------------------------------------------------------------------------------------------

    def warm_up(self) -> None:
        """Start a spare child that imports torch and waits, so that a small job does not wait for the import."""
        with self._children:
            if self.settings.worker_spare and not self.draining.is_set() and self._spare is None:
                self._spare = self._spawn(self._threads)

    def close(self) -> None:
        with self._children:
            if self._spare is not None:
                self._end(self._spare)
                self._spare = None

    def _spawn(self, threads: int) -> ChildProcess:
        network = not self.settings.sandbox_network
        return ChildProcess(
            self._root,
            threads=threads,
            network=network,
            command=self._child_command,
            vllm_python=self.settings.vllm_python,
        )

    def take_child(self, threads: int) -> ChildProcess:
        """A child for a job: the spare one if it has as many threads, else a new one. Its folder stays until `give_up_folder`."""
        with self._children:
            spare = None
            if threads == self._threads:
                spare, self._spare = self._spare, None
            if spare is not None and not spare.alive():
                log.warning("The spare child ended with status %s before it was used.", spare.wait(0))
                self._end(spare)
                spare = None
            child = spare or self._spawn(threads)
            self._folders.add(child.job_dir)
        return child

    def give_up_folder(self, child: ChildProcess) -> None:
        with self._children:
            self._folders.discard(child.job_dir)

    def _end(self, child: ChildProcess) -> None:
        child.kill()
        child.remove()

    # A job -----------------------------------------------------------------------------------------------------------

    def run(self, claimed: Claimed, *, claimed_at: float) -> None:
        """Run one attempt of a job to its end. Errors of the job are never raised."""
        attempt = _Attempt(self, claimed, claimed_at)
        try:
            about: dict[str, str | int] = {
                "nightpress.job_id": claimed.job.id,
                "nightpress.attempt": claimed.lease.attempt,
            }
            with (
                log_context(job_id=claimed.job.id, attempt=claimed.lease.attempt),
                span("attempt", about, parent=claimed.job.traceparent, kind="consumer") as here,
            ):
                here.set_attributes({"nightpress.outcome": attempt.run()})
        finally:
            self._clear()
            self.warm_up()

    def _clear(self) -> None:
        """Remove folders of earlier attempts that could not be removed then, e.g. for lack of file handles."""
        with self._children, contextlib.suppress(OSError):
            kept = self._folders | ({self._spare.job_dir} if self._spare is not None else set())
            for folder in list(self._root.iterdir()):
                if folder.resolve() not in kept:
                    shutil.rmtree(folder, ignore_errors=True)


class _Attempt:
    def __init__(self, supervisor: Supervisor, claimed: Claimed, claimed_at: float) -> None:
        self._supervisor = supervisor
        self._settings = supervisor.settings
        self._store = supervisor.store
        self._job: Job = claimed.job
        self._lease = claimed.lease
        self._share = claimed.share
        self._started = claimed_at
        self._child: ChildProcess | None = None
        self._depot: CheckpointDepot | None = None
        self._source: SourceKeeper | None = None
        self._keeper = LeaseKeeper(
            self._store,
            claimed.lease,
            ttl_s=self._settings.lease_ttl_s,
            claimed_at=claimed_at,
            on_renewed=self._beat,
        )
        self._extra = {"job_id": self._job.id, "attempt": self._lease.attempt}

    def run(self) -> str:
        """Run the attempt. Returns its outcome, as a label of the metric of attempts."""
        log.info("Job %s, attempt %d: started.", self._job.id, self._lease.attempt, extra=self._extra)
        flush_s = 0.0  # seconds for storing checkpoints; above 0 only if another attempt may follow
        outcome = "succeeded"
        try:
            ending = self._press()
        except LeaseLostError:
            ending, outcome = None, "lost"
        except CancelledError:
            ending, outcome = self._cancelled, "cancelled"
        except DrainedError:
            ending, outcome, flush_s = self._drained, "released", self._settings.drain_s / 2
        except NightpressError as error:
            ending, outcome = self._failed(error), error.code.value
            flush_s = self._settings.drain_s / 2 if error.kind.retryable else 0.0
        except Exception as error:
            log.exception("Job %s: an error of the supervisor itself.", self._job.id, extra=self._extra)
            outcome = ErrorCode.INTERNAL.value
            ending = self._failed(NightpressError(ErrorCode.INTERNAL, f"{type(error).__name__}: {error}"))
        finally:
            if self._child is not None:
                self._child.kill()
        if self._depot is not None:
            self._depot.close(flush_s=flush_s)
        self._keeper.close()  # the log needs the lease, which `ending` gives up
        try:
            with span("commit"):
                said = "the lease was lost, nothing is written" if ending is None else self._insist(ending)
            log.info("Job %s, attempt %d: %s.", self._job.id, self._lease.attempt, said, extra=self._extra)
        except LeaseLostError:
            outcome = "lost"
            log.warning("Job %s: the lease ran out before its end could be written.", self._job.id, extra=self._extra)
        finally:
            self._count(outcome)
            if self._child is not None:
                self._child.remove()
                self._supervisor.give_up_folder(self._child)
        return outcome

    def _count(self, outcome: str) -> None:
        ATTEMPTS.labels(self._job.queue, outcome).inc()
        if outcome == "lost":
            LEASES_LOST.inc()
        GPU_SECONDS.inc(len(self._share.gpus) * (time.monotonic() - self._started))

    def _press(self) -> Callable[[], str]:
        """Stage the files, run the child, and upload its result. Returns the function that commits the result."""
        self._child = child = self._supervisor.take_child(self._share.threads)
        with span("stage"):
            data = self._move(lambda: self._stage(child.job_dir))
        recipe = read_recipe(self._job)
        depot = self._depot = CheckpointDepot(
            self._supervisor.checkpoints,
            self._supervisor.objects,
            self._lease,
            self._job,
            recipe,
            child.job_dir,
            limit=self._settings.checkpoint_bytes,
            after_s=self._settings.checkpoint_after_s,
            tell=self._keeper.log_line,
            note=self._keeper.note,
        )
        with full_worker_disk():
            self._move(lambda: depot.begin(on_bytes=lambda _count: self._check()))
            measured_by = self._move(lambda: self._kept_source(recipe, child.job_dir))
        spec = JobSpec(
            job_id=self._job.id,
            attempt=self._lease.attempt,
            model_name=self._job.model_name,
            model_digest=self._job.model_digest,
            recipe=recipe,
            packages=catalog.providers_of(options.name for options in recipe.passes),
            data=data,
            device="cuda" if self._job.queue == "gpu" else "cpu",
            gpus=tuple(gpu.uuid for gpu in self._share.gpus) if self._settings.worker_queue == "gpu" else None,
            processes=max(1, len(self._share.gpus)),
            threads=self._share.threads,
            memory_limit=self._share.memory,
            source_measured_by=measured_by,
            keep_source=self._source is not None,
            file_limit=sandbox.file_limit(child.job_dir),
        )
        spec.save(child.job_dir)
        relay = Relay(child, self._keeper, keep=depot.keep, memory_limit=spec.memory_limit, stall_s=self._job.stall_s)
        child.begin(patience_s=self._settings.lease_ttl_s)
        with span("press", {"process.pid": child.pid}):
            self._relay(relay, child)
        self._supervisor.warm_up()
        return self._ship(spec, child.job_dir)

    def _relay(self, relay: Relay, child: ChildProcess) -> None:
        """Relay until the child ends. What it has measured of its source is kept even if the job has failed."""
        try:
            relay.run(self._check)
        except NightpressError:
            child.kill()
            self._store_source()
            raise
        child.kill()  # processes that it started must not outlive it, nor change the files that are read now
        self._store_source()

    def _kept_source(self, recipe: Recipe, job_dir: Path) -> str:
        """Bring what an earlier job has measured of the source. Returns that job's id; empty: there is none."""
        if not self._settings.keep_source_days:
            return ""
        gpu = self._share.gpus[0].name if self._share.gpus and recipe.measured_on_gpu(None) else ""
        self._source = SourceKeeper(self._store.sources, self._supervisor.objects, self._job, recipe, job_dir, gpu=gpu)
        return self._source.bring()

    def _store_source(self) -> None:
        if self._source is not None:
            self._move(self._source.store)

    def _stage(self, job_dir: Path) -> dict[str, str]:
        report = self._meter("fetching", 0.0, FETCHED)
        return self._supervisor.stager.stage(self._job, job_dir, on_total=report.expect, on_bytes=report.moved)

    def _ship(self, spec: JobSpec, job_dir: Path) -> Callable[[], str]:
        manifest = read_manifest(job_dir, self._lease)
        packages = tuple(str(package) for package in spec.packages.values())
        outcome = replace(outcome_of(job_dir, manifest), packages=packages)
        report = self._meter("uploading", PRESSED, 1.0)
        report.expect(sum(file.size for file in files_of(manifest)))
        with span("upload"):
            self._move(lambda: ship(job_dir, manifest, self._supervisor.objects, on_bytes=report.moved))
        self._check()

        def commit() -> str:
            won = self._store.attempts.finish(self._lease, outcome)
            return f"succeeded, {outcome.verdict}" if won else "finished too late: the lease was lost"

        return commit

    # How an attempt ends ---------------------------------------------------------------------------------------------

    def _cancelled(self) -> str:
        return "cancelled" if self._store.attempts.confirm_cancelled(self._lease) else "cancelled too late"

    def _drained(self) -> str:
        return "given back" if self._store.attempts.release(self._lease) else "given back too late"

    def _failed(self, error: NightpressError) -> Callable[[], str]:
        log.warning("Job %s: %s: %s", self._job.id, error.code, error, extra=self._extra)
        reason: str | None = None

        def end() -> str:
            nonlocal reason
            if reason is None:  # only once, even if the write below must be repeated
                if self._child is not None:
                    # Otherwise the job's own files could make the disk look full to the probe.
                    shutil.rmtree(self._child.job_dir, ignore_errors=True)
                if isinstance(error, MachineFaultError):
                    reason = error.reason
                else:
                    reason = (
                        self._supervisor.fitness.fault_behind(error, self._share.gpus) if error.kind.retryable else ""
                    )
            if reason and self._store.reader.machine_faults(self._job.id) + 1 < self._job.max_failures:
                details = error.details | {"machine": reason}
                fault = NightpressError(error.code, error.message, hint=error.hint, **details)
                return f"{reason}; " + (
                    "given back" if self._store.attempts.release(self._lease, fault) else "given back too late"
                )
            failed = self._store.attempts.fail(self._lease, error, backoff_s=self._settings.retry_backoff_s)
            return f"{error.code}, {failed or 'late'}"

        return end

    def _insist(self, write: Callable[[], Answer]) -> Answer:
        """Call `write` until the database answers. Raises LeaseLostError if the lease ends before."""
        while True:
            try:
                return write()
            except NightpressError as error:
                if error.code is not ErrorCode.DATABASE_UNAVAILABLE:
                    raise
                log.warning("The end of %s could not be written yet: %s", self._job.id, error, extra=self._extra)
            if self._keeper.lost:
                raise LeaseLostError
            time.sleep(random.uniform(0.1, 0.5))

    # Checks that may end it from outside -----------------------------------------------------------------------------

    def _check(self) -> None:
        """Raise if this attempt must stop now."""
        if self._keeper.lost:
            raise LeaseLostError
        if self._keeper.cancel_requested:
            raise CancelledError
        if self._supervisor.draining.is_set():
            raise DrainedError
        if time.monotonic() - self._started > self._job.run_limit_s:
            raise NightpressError(
                ErrorCode.DEADLINE_EXCEEDED,
                f"The job ran longer than its limit of {self._job.run_limit_s:g} s.",
                hint="Raise run_limit_s, or use a faster recipe.",
            )

    def _beat(self) -> None:
        if self._child is not None:
            self._child.beat()

    def _move(self, step: Callable[[], Answer]) -> Answer:
        return self._supervisor.storage_threads.run(step, self._check)

    def _meter(self, phase: Phase, low: float, high: float) -> Meter:
        return Meter(self._keeper, self._check, phase, low, high)
