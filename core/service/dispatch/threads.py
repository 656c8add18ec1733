"""Runs the attempts of an outbox in threads, so that a receiver that is slow or down delays neither the tick nor other receivers."""

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from nightpress.core.errors import NightpressError

log = logging.getLogger(__name__)

Due = TypeVar("Due")


class Threads(Generic[Due]):
    """Takes due rows of an outbox and starts an attempt of each. Any number of processes may do this on one outbox."""

    def __init__(self, name: str, *, at_a_time: int) -> None:
        """name: of the threads, and of the outbox in the log. at_a_time: number of attempts that run at the same time."""
        self._name = name
        self._room = 2 * at_a_time
        self._threads = ThreadPoolExecutor(at_a_time, thread_name_prefix=name)
        self._lock = threading.Lock()
        self._busy = 0

    def start(self, take: Callable[[int], Sequence[Due]], attempt: Callable[[Due], None]) -> int:
        """Start the attempts without waiting for them. Returns their number.

        take: (most rows to take) → the rows that this process has taken. attempt: must store its result; an error is logged.
        """
        free = self._room - self._busy
        if free <= 0:
            return 0
        taken = take(free)
        with self._lock:
            self._busy += len(taken)
        for due in taken:
            self._threads.submit(self._run, attempt, due)
        return len(taken)

    def close(self) -> None:
        """Wait for the attempts that run."""
        self._threads.shutdown(wait=True)

    def _run(self, attempt: Callable[[Due], None], due: Due) -> None:
        try:
            attempt(due)
        except NightpressError as error:
            log.warning("%s: %s could not be settled, and is tried again: %s", self._name, due, error)
        except Exception:
            log.exception("%s: an unexpected error with %s", self._name, due)
        finally:
            with self._lock:
                self._busy -= 1
