"""The only Celery task. A client that can reach the broker can make a worker query SQL for work, and nothing else."""

import logging
import time

from celery import Celery, Task

from nightpress.core.errors import NightpressError
from nightpress.core.service.jobs.ring import RING_TASK
from nightpress.core.tracing import record_span
from nightpress.worker.slot import Slot

log = logging.getLogger(__name__)


def add_tasks(app: Celery, slot: Slot) -> None:
    @app.task(name=RING_TASK, ignore_result=True, typing=False, bind=True)  # type: ignore[untyped-decorator]
    def ring(task: Task, *_queue: object) -> None:
        """The queue may have work. SQL decides whether there is a job, and which."""
        if rung_by := (task.request.headers or {}).get("traceparent"):
            record_span("hear", time.time_ns(), parent=str(rung_by), kind="consumer")
        try:
            slot.serve()
        except NightpressError as error:
            log.warning("A ring came to nothing: %s", error)
