"""Follows jobs: one query per interval for all watched jobs, however many streams watch them."""

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager

from nightpress.core.service.jobs.positions import Position

log = logging.getLogger(__name__)

_PAUSE_AFTER_ERROR_S = 2.0


class Watch:
    """A stream's view of its job: the job's last known position, and an event that wakes the stream when the position changes."""

    __slots__ = ("changed", "position")

    def __init__(self, position: Position | None) -> None:
        self.position = position
        self.changed = asyncio.Event()


class Tail:
    """Polls the positions of the watched jobs and wakes their streams, which read their lines from SQL themselves.

    It holds no lines. So a slow reader costs only its socket's buffer, and no line can be lost or repeated.
    """

    def __init__(
        self,
        positions: Callable[[Sequence[str]], Mapping[str, Position]],
        threads: Executor,
        *,
        interval_s: float = 0.25,
    ) -> None:
        self._positions = positions
        self._threads = threads
        self._interval_s = interval_s
        self._watches: dict[str, set[Watch]] = {}
        self._poller: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether the process is shutting down. Streams then end, and their readers reconnect with Last-Event-ID."""
        return self._closed

    def close(self) -> None:
        self._closed = True
        if self._poller is not None:
            self._poller.cancel()
        for watches in self._watches.values():
            for watch in watches:
                watch.changed.set()

    @contextmanager
    def watch(self, job_id: str) -> Iterator[Watch]:
        """Watch a job within the `with` block. The poller runs only while a job is watched."""
        watch = Watch(None)
        self._watches.setdefault(job_id, set()).add(watch)
        if self._poller is None or self._poller.done():
            self._poller = asyncio.get_running_loop().create_task(self._poll())
        try:
            yield watch
        finally:
            watches = self._watches[job_id]
            watches.discard(watch)
            if not watches:
                del self._watches[job_id]

    async def _poll(self) -> None:
        loop = asyncio.get_running_loop()
        while self._watches and not self._closed:
            try:
                found = await loop.run_in_executor(self._threads, self._positions, list(self._watches))
            except Exception as error:  # every stream of the process depends on this loop: try again after any error
                log.warning("event streams wait for the database: %s", error)
                await asyncio.sleep(_PAUSE_AFTER_ERROR_S)
                continue
            for job_id, position in found.items():
                for watch in self._watches.get(job_id, ()):
                    if watch.position != position:
                        watch.position = position
                        watch.changed.set()
            await asyncio.sleep(self._interval_s)
