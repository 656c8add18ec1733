"""The control process: the periodic work of the service. Any number of replicas may run; every step is safe to run twice."""

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from nightpress.core.database import make_engine
from nightpress.core.errors import NightpressError
from nightpress.core.logs import configure_logging
from nightpress.core.service.compose import Resources
from nightpress.core.service.deliveries.courier import DeliveryCourier
from nightpress.core.service.jobs import checkpoints, source_figures
from nightpress.core.service.jobs.ring import Ringer
from nightpress.core.service.jobs.roster import FLEET_MEMORY_S
from nightpress.core.service.registry.intake import Intake
from nightpress.core.service.schedules.bringing import Bringer
from nightpress.core.service.schedules.firing import Firing
from nightpress.core.service.studies.searching import Searching
from nightpress.core.service.trackers.courier import TrackerCourier
from nightpress.core.service.trackers.open import open_trackers
from nightpress.core.service.webhooks.courier import Courier
from nightpress.core.settings import load_settings
from nightpress.core.tracing import configure_tracing
from nightpress.worker.health import mark_alive
from nightpress.worker.metrics import LEASES_EXPIRED, TICKS, serve_metrics

_SWEEP_EVERY_S = 60.0
_ABANDONED_S = 3600.0  #: seconds until files of lost attempts, and files that a deletion left, are swept
_UPLOAD_LIFE_S = 24 * 3600.0
_LONGEST_PAUSE_S = 30.0
_DAY_S = 24 * 3600.0

log = logging.getLogger(__name__)


def attempt(name: str, step: Callable[[], object]) -> None:
    """Run a step. If it fails, log the error; the step runs again at the next tick."""
    try:
        with TICKS.labels(name).time():
            step()
    except NightpressError as error:
        log.warning("%s: %s", name, error)
    except Exception:
        log.exception("%s: an unexpected error", name)


class SlowSteps:
    """Runs steps that may wait for other systems, each in its own thread. A step that still runs is not started again."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(8, thread_name_prefix="slow")
        self._running: dict[str, Future[None]] = {}

    def start(self, name: str, step: Callable[[], object]) -> None:
        running = self._running.get(name)
        if running is None or running.done():
            self._running[name] = self._threads.submit(attempt, name, step)

    def close(self) -> None:
        self._threads.shutdown(wait=True)


@dataclass
class _Pause:
    """The time of a queue's next ring (monotonic). The pause doubles with each ring and is reset when the queue is empty."""

    seconds: float
    next_at: float = 0.0


class Control:
    """One replica of the control process. `tick` does everything that is due."""

    def __init__(self, resources: Resources, ring: Callable[[str], None]) -> None:
        self._settings = resources.settings
        self._resources = resources
        self._registries = (resources.models, resources.datasets)
        self._ring = ring
        bringer = Bringer(resources.schedule_store, resources.models, resources.settings)
        self._firing = Firing(
            resources.schedule_store, resources.jobs, resources.store, resources.studies, bringer, ring
        )
        self._searching = Searching(resources.study_ledger, resources.jobs, resources.store, resources.models, ring)
        self._courier = Courier(resources.webhooks, resources.settings)
        self._deliveries = DeliveryCourier(
            resources.deliveries,
            resources.credentials,
            resources.signing,
            resources.engine,
            resources.objects,
            resources.settings,
        )
        trackers = open_trackers(resources.settings)
        self._tracker_urls: dict[str, str] | None = {tracker.name: url for tracker, url in trackers}
        self._trackers = [
            TrackerCourier(tracker, resources.trackers, resources.run_contents) for tracker, _ in trackers
        ]
        self._intake = Intake(resources.engine, self._registries)
        self._slow = SlowSteps()
        self._pauses: dict[str, _Pause] = {}
        self._sweep_at = 0.0

    def tick(self) -> None:
        """Run all steps that are due. A step that fails does not stop the others, and runs again at the next tick."""
        steps = [
            self._expire_leases,
            self._expire_queue_deadlines,
            self._fire_schedules,
            self._advance_runs,
            self._advance_studies,
            self._take_in,
            self._deliver_webhooks,
            self._sign_artifacts,
            self._deliver_results,
            self._tell_trackers,
            self._confirm_sessions,
            self._count_costs,
            self._ring_queues,
        ]
        if time.monotonic() >= self._sweep_at:
            self._sweep_at = time.monotonic() + _SWEEP_EVERY_S
            steps += [self._forget_workers, self._forget_requests]
            # In their own threads: a store that hangs, or many files, must not delay the expiry of leases.
            for slow in (
                self._sweep_attempts,
                self._sweep_checkpoints,
                self._sweep_sources,
                self._sweep_uploads,
                self._prune,
                self._seal_credentials,
            ):
                self._slow.start(slow.__name__.strip("_"), slow)
        for step in steps:
            attempt(step.__name__.strip("_"), step)

    def close(self) -> None:
        """Release the claims of what is being fetched or delivered, and wait for messages and slow steps that still run."""
        self._intake.close()
        self._deliveries.close()
        self._courier.close()
        for courier in self._trackers:
            courier.close()
        self._slow.close()

    def _expire_leases(self) -> None:
        for job_id in self._resources.store.expiry.expire_leases(backoff_s=self._settings.retry_backoff_s):
            LEASES_EXPIRED.inc()
            log.warning("Job %s was taken from its worker.", job_id, extra={"job_id": job_id})

    def _count_costs(self) -> None:
        self._resources.costs.count_ended()

    def _confirm_sessions(self) -> None:
        """In its own thread: it waits for the provider that people sign in with."""
        if (sign_in := self._resources.sign_in) is not None:
            self._slow.start("confirm_sessions", sign_in.confirm_due)

    def _expire_queue_deadlines(self) -> None:
        for job_id in self._resources.store.expiry.expire_queue_deadlines():
            log.warning("Job %s waited too long.", job_id, extra={"job_id": job_id})

    def _fire_schedules(self) -> None:
        self._firing.fire()

    def _advance_runs(self) -> None:
        """In its own thread: a source that does not answer delays schedules, but not the expiry of leases."""
        self._slow.start("advance_runs", self._firing.advance)

    def _advance_studies(self) -> None:
        """In its own thread: the sampler computes for some tenths of a second."""
        self._slow.start("advance_studies", self._searching.advance)

    def _take_in(self) -> None:
        self._intake.advance()

    def _deliver_webhooks(self) -> None:
        self._courier.deliver()

    def _sign_artifacts(self) -> None:
        self._resources.signing.sign_pending()

    def _deliver_results(self) -> None:
        self._deliveries.advance()

    def _seal_credentials(self) -> None:
        """Encrypt stored credentials by the newest key, after the operator has put one in front."""
        self._resources.credentials.seal_again()

    def _tell_trackers(self) -> None:
        if self._tracker_urls is not None:
            self._resources.trackers.use(self._tracker_urls)
            self._tracker_urls = None
        for courier in self._trackers:
            courier.deliver()

    def _prune(self) -> None:
        settings = self._settings
        self._resources.schedule_store.forget_runs(settings.keep_history_days * _DAY_S)
        self._resources.webhooks.forget_deliveries(settings.keep_history_days * _DAY_S)
        self._resources.deliveries.forget(settings.keep_history_days * _DAY_S)
        self._resources.trackers.forget(settings.keep_history_days * _DAY_S)
        if settings.keep_audit_days:
            self._resources.audit.prune(settings.keep_audit_days * _DAY_S)
        if settings.keep_artifacts_days and (
            count := self._resources.retention.prune_artifacts(settings.keep_artifacts_days * _DAY_S)
        ):
            log.info("The artifacts of %d old jobs were removed.", count)
        if settings.keep_jobs_days and (
            count := self._resources.retention.prune_jobs(settings.keep_jobs_days * _DAY_S)
        ):
            log.info("%d old jobs were removed.", count)
        if settings.keep_jobs_days:
            self._resources.study_ledger.forget(settings.keep_jobs_days * _DAY_S)
        for registry in self._registries if settings.keep_fetched_days else ():
            if count := registry.forget_superseded(settings.keep_fetched_days * _DAY_S):
                log.info("%d fetched %s were removed: there are newer ones.", count, registry.kind)

    def _forget_requests(self) -> None:
        self._resources.idempotency.prune()
        self._resources.sessions.prune()

    def _ring_queues(self) -> None:
        """Ring the queues that have work and an idle worker. A busy worker looks for work by itself when its job ends."""
        work = self._resources.store.reader.queues_with_work()
        self._pauses = {queue: self._pauses.get(queue) or _Pause(self._settings.tick_s) for queue in work}
        idle: set[str] = (
            {worker.queue for worker in self._resources.store.roster.workers() if worker.state == "idle"}
            if work
            else set()
        )
        for queue, pause in self._pauses.items():
            if queue in idle and time.monotonic() >= pause.next_at:
                self._ring(queue)
                pause.next_at = time.monotonic() + pause.seconds
                pause.seconds = min(2 * pause.seconds, _LONGEST_PAUSE_S)

    def _forget_workers(self) -> None:
        self._resources.store.roster.forget_workers(FLEET_MEMORY_S)

    def _sweep_attempts(self) -> None:
        for job_id, attempt in self._resources.store.reader.abandoned_attempts(older_than_s=_ABANDONED_S):
            self._resources.objects.delete_prefix(f"jobs/{job_id}/attempts/{attempt}")
            self._resources.store.expiry.mark_swept(job_id, attempt)

    def _sweep_checkpoints(self) -> None:
        keep_s = self._settings.checkpoint_keep_s
        for digest in self._resources.checkpoints.due(keep_s):
            self._resources.objects.delete_prefix(checkpoints.folder_of(digest))
            self._resources.checkpoints.prune(digest, keep_s)

    def _sweep_sources(self) -> None:
        keep_s, sources = self._settings.keep_source_days * _DAY_S, self._resources.store.sources
        for digest in sources.due(keep_s):
            self._resources.objects.delete_prefix(source_figures.folder_of(digest))
            sources.prune(digest, keep_s)

    def _sweep_uploads(self) -> None:
        for registry in self._registries:
            if given_up := registry.sweep_abandoned(_UPLOAD_LIFE_S):
                log.info("%d uploads of %s were given up.", given_up, registry.kind)
            registry.sweep_deleted(_ABANDONED_S)
        self._resources.objects.sweep_uploads(_UPLOAD_LIFE_S)


def main() -> int:
    settings = load_settings()
    configure_logging(settings.log_level, settings.log_format)
    configure_tracing(settings.otlp_endpoint, "control")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    engine = make_engine(settings.sql_url)
    ringer = Ringer(settings)
    resources = Resources(settings, engine)
    control = Control(resources, ringer.ring)
    serve_metrics(settings.metrics_port)
    log.info("The control process ticks every %g s.", settings.tick_s)
    while not stop.is_set():
        control.tick()
        mark_alive(settings.data_dir, "control")
        stop.wait(settings.tick_s)
    control.close()
    ringer.close()
    resources.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
