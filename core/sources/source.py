"""The one seam to places that models and data sets are fetched from."""

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from nightpress.core.errors import ErrorCode, NightpressError

_TRIES = 4  #: in a row without a byte more
_PAUSE_S = 1.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RemoteFile:
    """One file at a source."""

    path: str  #: relative to the source's folder
    size: int
    version: str  #: what pins its content: an ETag, or a commit
    sha256: str | None = None  #: where the source says so


@dataclass(frozen=True)
class Listing:
    """What a source holds, all files of it at one moment."""

    revision: str  #: two listings with the same revision hold the same bytes
    files: tuple[RemoteFile, ...]


class Source(Protocol):
    """Raises NightpressError: not_found, source_refused, source_unavailable (try again)."""

    def listing(self) -> Listing: ...

    def read(self, file: RemoteFile, start: int) -> Iterator[bytes]:
        """The bytes from `start` on. Raises source_unavailable too where the file is no longer the one that was listed."""

    def close(self) -> None: ...


def read_steadily(
    source: Source, file: RemoteFile, *, stop: Callable[[], bool], pause_s: float = _PAUSE_S
) -> Iterator[bytes]:
    """A file's bytes through breaks of the connection: each time from where it broke off. `stop` ends it with an error."""
    position, tries = 0, 0
    while position < file.size:
        try:
            for piece in source.read(file, position):
                if stop():
                    raise NightpressError(ErrorCode.CANCELLED, f"Fetching {file.path} was given up.")
                position, tries = position + len(piece), 0
                yield piece
            if position >= file.size:
                break
            raise unavailable(file.path, f"it ended after {position} of {file.size} bytes")
        except NightpressError as error:
            tries += 1
            if not error.kind.retryable or tries >= _TRIES:
                raise
            log.warning("%s (goes on from byte %d)", error.message, position)
            time.sleep(pause_s * tries)
    if position != file.size:
        raise unavailable(file.path, f"it has {position} bytes instead of {file.size}")


def revision_of(lines: Iterable[str]) -> str:
    return "sha256:" + hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def unavailable(what: str, why: str) -> NightpressError:
    return NightpressError(
        ErrorCode.SOURCE_UNAVAILABLE,
        f"{what} can't be read now: {why}.",
        hint="It is tried again by itself. If that goes on, ask the operator whether the source's address is right.",
    )


def refused(what: str, hint: str) -> NightpressError:
    return NightpressError(ErrorCode.SOURCE_REFUSED, f"The source refuses access to {what}.", hint=hint)
