"""The worker's content-addressed cache: files by their SHA-256, limited in size, safe to share between workers of one machine.

A blob is locked while it is fetched or linked. The locks are the kernel's (flock), so that a killed worker holds none.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from filelock import FileLock, Timeout

from nightpress.core.artifacts.checks import wrong_checksum
from nightpress.core.artifacts.storage import OnBytes
from nightpress.core.disk import full_disk

_CHUNK = 1024**2


class BlobCache:
    """A cache that provides files as read-only hard links, or as copies if the file system can't link.

    Every use hashes the bytes again, so that a fault of the disk or of another process is found before a job uses the file.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._blobs = folder / "blobs"
        self._locks = folder / "locks"
        self._limit = limit
        self._blobs.mkdir(parents=True, exist_ok=True)
        self._locks.mkdir(exist_ok=True)
        self._drop_partial_blobs()

    def take(self, sha256: str, size: int, target: Path, fetch: Callable[[Path], None], *, on_bytes: OnBytes) -> None:
        """Put the blob at `target`.

        `fetch`: called with a path to write the blob to, if the cache does not hold it. `on_bytes`: called with the number of bytes hashed
        since its last call. Raises checksum_mismatch, disk_full and what `fetch` raises.
        """
        with full_worker_disk():
            if size > self._limit:
                fetch(target)
                return
            blob = self._blobs / sha256
            with self._lock(sha256):
                if blob.exists() and _same(blob, sha256, size, on_bytes):
                    os.utime(blob)  # last used now
                else:
                    blob.unlink(missing_ok=True)
                    self._make_room(size)
                    partial = blob.with_suffix(".partial")
                    fetch(partial)
                    partial.chmod(0o444)
                    partial.replace(blob)
                link_or_copy(blob, target)

    def _make_room(self, size: int) -> None:
        """Remove the least recently used blobs. A blob that a job still links would free nothing, so it stays."""
        with FileLock(self._locks / "eviction.lock"):
            blobs = sorted(((path.stat(), path) for path in self._blobs.iterdir()), key=lambda entry: entry[0].st_mtime)
            excess = sum(info.st_size for info, _ in blobs) + size - self._limit
            for info, path in blobs:
                if excess <= 0:
                    return
                if info.st_nlink > 1 or path.suffix:
                    continue
                with contextlib.suppress(Timeout), self._lock(path.name, timeout=0):
                    path.unlink(missing_ok=True)
                    excess -= info.st_size

    def _drop_partial_blobs(self) -> None:
        for partial in self._blobs.glob("*.partial"):
            with contextlib.suppress(Timeout), self._lock(partial.stem, timeout=0):
                partial.unlink(missing_ok=True)

    def _lock(self, sha256: str, timeout: float = -1) -> FileLock:
        return FileLock(self._locks / f"{sha256}.lock", timeout=timeout)


def stage_in_place(source: Path, sha256: str, size: int, target: Path, *, link: bool, on_bytes: OnBytes) -> None:
    """Put a file of this machine at `target`. Raises checksum_mismatch if it is no longer the file that was registered.

    `link`: make a hard link if possible; else copy.
    """
    with full_worker_disk():
        if link:
            link_or_copy(source, target)
        else:
            shutil.copyfile(source, target)
        if not _same(target, sha256, size, on_bytes):
            found = "other bytes" if target.lstat().st_size == size else f"{target.lstat().st_size} bytes"
            target.unlink()
            raise wrong_checksum(str(source), sha256, found)


def link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.EACCES}:
            raise
        shutil.copyfile(source, target)
        target.chmod(0o444)


def _same(path: Path, sha256: str, size: int, on_bytes: OnBytes) -> bool:
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode) or found.st_size != size:
        return False
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            on_bytes(len(chunk))
    return digest.hexdigest() == sha256


def full_worker_disk() -> AbstractContextManager[None]:
    """Raise NightpressError(disk_full) if the worker's disk is full."""
    return full_disk(
        "The worker's disk is full",
        "Free space in the worker's NIGHTPRESS_DATA_DIR or lower NIGHTPRESS_CACHE_BYTES.",
    )
