"""Runs transfers with the object store in separate threads: a store that hangs blocks a thread, but no cancellation and no drain."""

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

_LOOK_S = 0.2

Answer = TypeVar("Answer")


class StorageThreads:
    """The transfers of one worker.

    An abandoned step continues until the store's own time-outs. What it stores afterwards is never committed.
    """

    def __init__(self) -> None:
        self._given_up: list[threading.Thread] = []

    def run(self, step: Callable[[], Answer], check: Callable[[], None]) -> Answer:
        """Run `step` in a new thread and return its result. `check` is called while waiting; if it raises, the step is abandoned."""
        done: Future[Answer] = Future()

        def work() -> None:
            try:
                done.set_result(step())
            except BaseException as error:
                done.set_exception(error)

        thread = threading.Thread(target=contextvars.copy_context().run, args=(work,), name="storage", daemon=True)
        thread.start()
        try:
            while not wait([done], timeout=_LOOK_S).done:
                check()
        except BaseException:
            self._given_up = [each for each in [*self._given_up, thread] if each.is_alive()]
            raise
        return done.result()

    def hangs(self) -> bool:
        """Whether an abandoned step still waits for the store."""
        return any(thread.is_alive() for thread in self._given_up)
