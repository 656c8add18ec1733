"""A process's right to work on one row, e.g. to fetch a model or to deliver an artifact. It expires unless the process renews it."""

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from nightpress.core.errors import ErrorCode, NightpressError


@dataclass
class Claim:
    """A claim that one process holds. `note` counts the transferred bytes, and raises if the claim is lost."""

    row_id: str
    claim_id: str
    total: int = 0
    done: int = 0
    skipped: int = 0  #: bytes of `done` that an earlier attempt had transferred
    lost: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def progress(self) -> float:
        return min(1.0, self.done / self.total) if self.total else 0.0

    @property
    def sent(self) -> int:
        return self.done - self.skipped

    def count(self, count: int) -> None:
        """Add `count` transferred bytes. Threads may call this."""
        with self._lock:
            self.done += count

    def skip(self, count: int) -> None:
        """Add bytes that need no transfer. Raises NightpressError(cancelled) if the claim is lost."""
        with self._lock:
            self.skipped += count
        self.note(count)

    def note(self, count: int) -> None:
        """Add `count` transferred bytes. Raises NightpressError(cancelled) if the claim is lost."""
        self.count(count)
        if self.lost.is_set():
            raise NightpressError(
                ErrorCode.CANCELLED, "It was deleted or cancelled meanwhile, or another process has taken over."
            )

    def counted(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            yield piece
            self.note(len(piece))
