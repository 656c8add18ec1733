"""The Celery worker: one process for one host."""

import logging
import os
import signal
from collections.abc import Sequence

from celery import Celery, signals
from celery.apps.worker import Worker as CeleryWorker
from celery.worker import state as celery_state

from nightpress.core.database import make_engine
from nightpress.core.ids import new_id
from nightpress.core.service.compose import Resources
from nightpress.core.service.jobs.records import WorkerOffer
from nightpress.core.service.jobs.ring import make_celery
from nightpress.core.settings import Settings
from nightpress.core.tracing import configure_tracing
from nightpress.worker.cache import BlobCache
from nightpress.worker.folder import WorkerFolder
from nightpress.worker.metrics import serve_metrics
from nightpress.worker.offer import make_offer
from nightpress.worker.probe import probe_walls
from nightpress.worker.process import CHILD_COMMAND
from nightpress.worker.slot import Slot
from nightpress.worker.staging import Stager
from nightpress.worker.supervisor import Supervisor
from nightpress.worker.tasks import add_tasks

_RESTART_S = 1.0

log = logging.getLogger(__name__)


def run_worker(settings: Settings, *, child_command: Sequence[str] = CHILD_COMMAND) -> None:
    """Serve settings.worker_queue until SIGTERM or SIGINT."""
    worker_id = new_id("wkr")
    folder = WorkerFolder(settings.data_dir / "work", worker_id)
    standing = probe_walls(folder.path / "probe", network=not settings.sandbox_network)
    log.log(logging.WARNING if standing.down else logging.INFO, "From jobs here, this is %s", standing)
    configure_tracing(settings.otlp_endpoint, "worker")
    offer = make_offer(settings, worker_id)
    engine = make_engine(settings.sql_url, pool_size=5 + offer.shares)
    resources = Resources(settings, engine)
    cache = BlobCache(settings.data_dir / "cache", settings.cache_bytes)
    supervisor = Supervisor(
        settings,
        resources.store,
        resources.objects,
        Stager(engine, resources.objects, cache),
        resources.checkpoints,
        folder.path,
        threads=offer.threads_of(1),
        child_command=child_command,
    )
    slot = Slot(resources.store, supervisor, offer, ttl_s=settings.lease_ttl_s)
    app = make_celery(settings)
    add_tasks(app, slot)
    # Celery calls this within a signal handler, so it only sets a flag. Celery's default weak references would be collected before.
    signals.worker_shutting_down.connect(lambda **_: supervisor.draining.set(), weak=False)
    signals.worker_ready.connect(
        lambda **_: log.info("Worker %s serves %s.", offer.worker_id, " and ".join(offer.queues)), weak=False
    )
    serve_metrics(settings.metrics_port)
    _drain_before_celery_listens(supervisor)
    slot.open()
    try:
        while not supervisor.draining.is_set():
            _listen(app, offer, settings)
            # Celery stops at a message that it can't decode. The slot continues; only rings are missed until Celery runs again.
            supervisor.draining.wait(_RESTART_S)
    finally:
        slot.close(timeout=settings.drain_s)
        folder.close()
        engine.dispose()
        if supervisor.storage_threads.hangs():
            log.warning("The object store does not answer; its last requests are given up.")
            logging.shutdown()
            os._exit(os.EX_OK)  # otherwise Python would wait for the storage threads


def _drain_before_celery_listens(supervisor: Supervisor) -> None:
    """Handle signals until Celery installs its own handlers: the worker takes jobs from now on, and Celery starts a little later."""

    def drain(*_: object) -> None:
        supervisor.draining.set()
        celery_state.should_stop = os.EX_OK  # a Celery worker that starts after this ends at once

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, drain)


def _listen(app: Celery, offer: WorkerOffer, settings: Settings) -> None:
    """Receive rings until a signal or a fault ends Celery."""
    celery: CeleryWorker = app.Worker(
        hostname=f"{offer.worker_id}@nightpress",
        queues=list(offer.queues),
        pool="threads",
        concurrency=1,
        loglevel=settings.log_level,
        quiet=True,
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
    )
    celery.start()
