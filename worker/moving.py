"""Waiting for the object store without being held up by it: one that hangs holds a thread, and never a cancellation or a drain."""

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

_LOOK_S = 0.2

Answer = TypeVar("Answer")


class Mover:
    """Moves files for one worker. What is given up goes on until the store's own time-outs; nothing it then stores is ever committed."""

    def __init__(self) -> None:
        self._given_up: list[threading.Thread] = []

    def move(self, step: Callable[[], Answer], check: Callable[[], None]) -> Answer:
        """Do `step` in a thread of its own, and meanwhile call `check` again and again; what that raises ends the wait."""
        done: Future[Answer] = Future()

        def run() -> None:
            try:
                done.set_result(step())
            except BaseException as error:
                done.set_exception(error)

        thread = threading.Thread(target=contextvars.copy_context().run, args=(run,), name="moving", daemon=True)
        thread.start()
        try:
            while not wait([done], timeout=_LOOK_S).done:
                check()
        except BaseException:
            self._given_up = [one for one in [*self._given_up, thread] if one.is_alive()]
            raise
        return done.result()

    def hangs(self) -> bool:
        """Whether something that was given up still waits for the store."""
        return any(thread.is_alive() for thread in self._given_up)
