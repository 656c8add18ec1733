"""A process's right to fetch or verify one model or data set. It expires unless the process renews it."""

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
    lost: threading.Event = field(default_factory=threading.Event)

    @property
    def progress(self) -> float:
        return min(1.0, self.done / self.total) if self.total else 0.0

    def note(self, count: int) -> None:
        """Add `count` transferred bytes. Raises NightpressError(cancelled) if the claim is lost."""
        self.done += count
        if self.lost.is_set():
            raise NightpressError(ErrorCode.CANCELLED, "It was deleted meanwhile, or another process has taken over.")

    def counted(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            yield piece
            self.note(len(piece))
