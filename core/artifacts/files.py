"""Atomic writes of files, and the translation of the operating system's errors."""

import contextlib
import errno
import hashlib
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from nightpress.core.artifacts.checks import wrong_checksum
from nightpress.core.disk import full_disk
from nightpress.core.errors import ErrorCode, NightpressError

OWN = ".np-"  #: prefix of the names of our own files and folders beside objects; no part of a key may begin with it


def write_atomically(path: Path, pieces: Iterable[bytes], *, key: str, sha256: str | None, durable: bool) -> None:
    """Write a temporary file beside `path` and rename it: `path` appears whole or not at all. Raises checksum_mismatch for other bytes.

    `durable`: sync the file and its folder before returning, so that the file survives a power cut.
    """
    temporary, target = _create_beside(path)
    try:
        digest = hashlib.sha256()
        with target:
            for piece in pieces:
                if sha256 is not None:
                    digest.update(piece)
                target.write(piece)
            if sha256 is not None and digest.hexdigest() != sha256:
                raise wrong_checksum(key, sha256, digest.hexdigest())
            if durable:
                target.flush()
                os.fsync(target.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _create_beside(path: Path) -> tuple[Path, BinaryIO]:
    temporary = path.with_name(f"{OWN}{secrets.token_hex(8)}")
    for _ in range(10):
        path.parent.mkdir(parents=True, exist_ok=True)
        # A concurrent deletion may remove the empty folder between mkdir and open: try again.
        with contextlib.suppress(FileNotFoundError):
            return temporary, temporary.open("xb")
    raise FileNotFoundError(errno.ENOENT, "the folder vanishes again and again", str(path.parent))


@contextlib.contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Raise NightpressError: disk_full, or storage_unavailable for any other OSError."""
    try:
        with full_disk(
            f"{what} could not be written",
            "Nothing half-made was kept. Free some space, or move the folder to a larger disk.",
        ):
            yield
    except OSError as error:
        raise NightpressError(
            ErrorCode.STORAGE_UNAVAILABLE,
            f"{what} could not be read or written: {error.strerror or error}.",
            hint="See that the folder exists and that this process may use it.",
        ) from error
