"""The ring: a Celery message that means "this queue may have work". It names no job and grants no right.

If a ring is lost, the work starts at most a tick later. Ringer publishes from its own thread, so that a slow or dead broker never
delays the caller.
"""

import logging
import threading
import time
from typing import Final

from celery import Celery
from kombu import Queue

from nightpress.core.settings import Settings
from nightpress.core.tracing import span, traceparent

RING_TASK: Final = "nightpress.ring"
QUEUES: Final = ("cpu", "gpu", "control")
_RING_LIFE_S: Final = 60  #: seconds after which an unread ring expires; the control process has sent a new one by then
_FIRST_PAUSE_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 15.0
_REST_S: Final = 0.02  #: pause between rings: at most fifty rings a second, even for hundreds of submissions a second

log = logging.getLogger(__name__)


def make_celery(settings: Settings) -> Celery:
    """Make the Celery application: only JSON, no result backend, early acknowledgement, no prefetching, and publishing fails fast."""
    app = Celery("nightpress", broker=settings.celery_url)
    app.conf.update(
        accept_content=["json"],
        task_serializer="json",
        task_ignore_result=True,
        task_acks_late=False,
        task_reject_on_worker_lost=False,
        task_publish_retry=False,
        task_create_missing_queues=False,
        task_queues=[Queue(name) for name in QUEUES],
        task_default_queue="control",
        worker_disable_prefetch=True,
        worker_prefetch_multiplier=1,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_soft_shutdown_timeout=settings.drain_s,
        worker_hijack_root_logger=False,
        worker_enable_remote_control=False,  # a client that can reach the broker can only ring
        worker_send_task_events=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={"socket_timeout": 5, "socket_connect_timeout": 1, "max_retries": 0},
        redis_socket_timeout=5,
        redis_socket_connect_timeout=1,
        redis_retry_on_timeout=False,
    )
    return app


class Ringer:
    """Sends rings in the background. Several pending rings of one queue are sent as one."""

    def __init__(self, settings: Settings) -> None:
        self._app = make_celery(settings)
        self._wanted: dict[str, str | None] = {}  #: queue → `traceparent` of the first caller that rang it
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._publish, name="ringer", daemon=True)
        self._thread.start()

    def ring(self, queue: str) -> None:
        """Announce that a queue may have work. Never blocks and never raises."""
        with self._changed:
            if queue not in self._wanted:
                self._wanted[queue] = traceparent()
                self._changed.notify()

    def close(self) -> None:
        """Send the pending rings if the broker answers, then stop."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout=2)
        self._app.close()

    def _publish(self) -> None:
        pause = 0.0
        while True:
            with self._changed:
                if pause:  # the broker is down: drop the rings of this time; the control process rings again
                    self._changed.wait_for(lambda: self._closed, timeout=pause)
                    self._wanted.clear()
                self._changed.wait_for(lambda: self._wanted or self._closed)
                if not self._wanted:
                    return
                queue, wanted_by = self._wanted.popitem()
            if self._send(queue, wanted_by):
                pause = 0.0
                time.sleep(_REST_S)
            else:
                pause = min(max(2 * pause, _FIRST_PAUSE_S), _LONGEST_PAUSE_S)

    def _send(self, queue: str, wanted_by: str | None) -> bool:
        try:
            with span("ring", {"nightpress.queue": queue}, parent=wanted_by, kind="producer"):
                told = {"traceparent": traceparent()}
                self._app.send_task(
                    RING_TASK, args=[queue], queue=queue, retry=False, expires=_RING_LIFE_S, headers=told
                )
        except Exception as error:
            log.warning("The broker did not take a ring of %s: %s", queue, error)
            return False
        return True
