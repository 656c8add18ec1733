"""The interface to the places that models and data sets are fetched from."""

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from nightpress.core.errors import ErrorCode, NightpressError

_TRIES = 4  #: most tries in a row that bring no new byte
_PAUSE_S = 1.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RemoteFile:
    """One file at a source."""

    path: str  #: relative to the source's folder
    size: int
    version: str  #: pins the content: an ETag, or a commit
    sha256: str | None = None  #: None if the source does not publish it


@dataclass(frozen=True)
class Listing:
    """All files of a source at one moment."""

    revision: str  #: two listings with the same revision hold the same bytes
    files: tuple[RemoteFile, ...]


class Source(Protocol):
    """A place to fetch files from. The methods raise NightpressError: not_found, source_refused, source_unavailable (try again)."""

    def listing(self) -> Listing: ...

    def read(self, file: RemoteFile, start: int) -> Iterator[bytes]:
        """The bytes from position `start` to the end. Raises source_unavailable also if the file has changed since the listing."""

    def close(self) -> None: ...


def read_steadily(
    source: Source, file: RemoteFile, *, stop: Callable[[], bool], pause_s: float = _PAUSE_S
) -> Iterator[bytes]:
    """Yield a file's bytes. When the connection breaks, continue at the position it had reached.

    `stop`: called before each piece; if it returns True, NightpressError(cancelled) is raised. `pause_s`: seconds before the first retry.
    Raises source_unavailable after `_TRIES` tries without a new byte.
    """
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
