"""Following jobs: one query an interval for all the jobs that anybody watches, whatever the number of watchers."""

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager

from nightpress.core.service.jobs.positions import Position

log = logging.getLogger(__name__)

_PAUSE_AFTER_ERROR_S = 2.0


class Watch:
    """One stream's view of its job: how far the history goes, and a flag that wakes the stream when that changes."""

    __slots__ = ("changed", "position")

    def __init__(self, position: Position | None) -> None:
        self.position = position
        self.changed = asyncio.Event()


class Tail:
    """Holds no events, only positions: each stream reads its own lines from SQL after its own cursor.

    So a slow reader costs nothing but its socket's buffer, and nothing can be lost or doubled between the poller and a stream.
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
        """The process is going down: streams end, and their readers come back with Last-Event-ID."""
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
        """Be woken when the job's history grows. The poller runs only while somebody watches."""
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
            except Exception as error:  # every stream of the process hangs on this loop: it asks again, whatever it was
                log.warning("event streams wait for the database: %s", error)
                await asyncio.sleep(_PAUSE_AFTER_ERROR_S)
                continue
            for job_id, position in found.items():
                for watch in self._watches.get(job_id, ()):
                    if watch.position != position:
                        watch.position = position
                        watch.changed.set()
            await asyncio.sleep(self._interval_s)
