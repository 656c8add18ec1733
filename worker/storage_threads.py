"""Work with the object store in threads of its own: a store that hangs holds a thread, and never a cancellation or a drain."""

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

_LOOK_S = 0.2

Answer = TypeVar("Answer")


class StorageThreads:
    """The transfers of one worker.

    A step that is given up goes on until the store's own time-outs. Nothing that it then stores is ever committed.
    """

    def __init__(self) -> None:
        self._given_up: list[threading.Thread] = []

    def run(self, step: Callable[[], Answer], check: Callable[[], None]) -> Answer:
        """Do `step` in a thread of its own and return its result. `check` is called meanwhile; what it raises ends the wait."""
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
        """Whether a step that was given up still waits for the store."""
        return any(thread.is_alive() for thread in self._given_up)
