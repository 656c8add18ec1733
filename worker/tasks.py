"""The one Celery task. Whoever can reach the broker can make a worker look into SQL, and nothing else."""

import logging

from celery import Celery

from core.errors import NightpressError
from core.jobs.ring import RING_TASK
from worker.slot import Slot

log = logging.getLogger(__name__)


def add_tasks(app: Celery, slot: Slot) -> None:
    @app.task(name=RING_TASK, ignore_result=True, typing=False)  # type: ignore[untyped-decorator]
    def ring(*_queue: object) -> None:
        """The queue may have work. Which job, and whether, SQL decides."""
        try:
            slot.serve()
        except NightpressError as error:
            log.warning("A ring came to nothing: %s", error)
