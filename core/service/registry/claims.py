"""A process's right to take in one model or data set: for a while, and only as long as it renews it."""

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from nightpress.core.errors import ErrorCode, NightpressError


@dataclass
class Claim:
    """One process holds it. `note` counts the transferred bytes, and raises when the claim is lost."""

    row_id: str
    claim_id: str
    total: int = 0
    done: int = 0
    lost: threading.Event = field(default_factory=threading.Event)

    @property
    def progress(self) -> float:
        return min(1.0, self.done / self.total) if self.total else 0.0

    def note(self, count: int) -> None:
        """Raises NightpressError(cancelled)."""
        self.done += count
        if self.lost.is_set():
            raise NightpressError(ErrorCode.CANCELLED, "It was deleted meanwhile, or another process has taken over.")

    def counted(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            yield piece
            self.note(len(piece))
