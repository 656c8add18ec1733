"""Objects in a local folder: the embedded stack's store. A key is a path relative to the folder."""

# ruff: noqa: ARG002 - the Protocol serves stores that need more than this one

import contextlib
import datetime as dt
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from nightpress.core.artifacts.checks import exactly, missing_object, valid_key, wrong_checksum
from nightpress.core.artifacts.files import OWN, storage_errors, write_atomically
from nightpress.core.artifacts.storage import PRESIGN_S, ObjectInfo, OnBytes, SignedRequest
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.ids import new_id
from nightpress.core.numbers import whole_number

_PIECE = 1024**2
_UPLOADS = f"{OWN}uploads"


class LocalStore:
    """A store whose files are written beside their final name, synced and renamed: a file is complete or absent.

    Bytes are always copied, never linked: the writer of the source may still have it open and change it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    def put_file(self, key: str, path: Path, *, sha256: str | None = None, on_bytes: OnBytes | None = None) -> None:
        with storage_errors(key), path.open("rb") as source:
            self._write(key, _pieces(source, on_bytes), sha256)

    def put_bytes(self, key: str, data: bytes) -> None:
        with storage_errors(key):
            self._write(key, [data], None)

    def put_pieces(self, key: str, pieces: Iterable[bytes], *, size: int, sha256: str | None = None) -> str:
        digest = hashlib.sha256()

        def hashed() -> Iterator[bytes]:
            for piece in exactly(key, pieces, size):
                digest.update(piece)
                yield piece
            if sha256 is not None and digest.hexdigest() != sha256:
                raise wrong_checksum(key, sha256, digest.hexdigest())

        with storage_errors(key):
            self._write(key, hashed(), None)
        return digest.hexdigest()

    def get_file(self, key: str, path: Path, *, sha256: str | None = None, on_bytes: OnBytes | None = None) -> None:
        with storage_errors(key), self._open(key) as source:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, _pieces(source, on_bytes), key=key, sha256=sha256, durable=False)

    def read(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        with storage_errors(key), self._open(key) as source:
            source.seek(start)
            yield from _pieces(source, None, limit=None if end is None else end - start)

    def stat(self, key: str) -> ObjectInfo | None:
        path = self._path(key)
        try:
            info = path.stat(follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return _info(key, info) if path.is_file() else None

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        folder = self._path(prefix.rstrip("/")) if prefix else self.root
        for parent, folders, names in os.walk(folder):
            folders[:] = sorted(name for name in folders if not name.startswith(OWN))
            for name in sorted(names):
                path = Path(parent, name)
                if not name.startswith(OWN):
                    with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                        yield _info(path.relative_to(self.root).as_posix(), path.stat())

    def delete_prefix(self, prefix: str) -> int:
        path = self._path(prefix.rstrip("/"))
        with storage_errors(prefix):
            if path.is_file():
                path.unlink()
                count = 1
            else:
                count = sum(1 for _ in self.list(prefix))
                # Rename first, so that no reader sees a folder that is partly deleted.
                doomed = self.root / f"{OWN}{new_id('gone')}"
                try:
                    path.rename(doomed)
                except FileNotFoundError:
                    return 0
                shutil.rmtree(doomed)
            self._prune(path.parent)
        return count

    def presign_get(self, key: str, *, filename: str, expires_s: int = PRESIGN_S) -> str | None:
        return None

    # Uploads -----------------------------------------------------------------------------------------------------

    def begin_upload(self, key: str, *, sha256: str, signed_parts: bool) -> str:
        valid_key(key)
        upload_id = new_id("up")
        with storage_errors(key):
            self._parts(upload_id).mkdir(parents=True)
        return upload_id

    def presign_part(
        self,
        key: str,
        upload_id: str,
        number: int,
        *,
        size: int,
        sha256: str | None,
        expires_s: int = PRESIGN_S,
    ) -> SignedRequest | None:
        return None

    def receive_part(
        self, key: str, upload_id: str, number: int, pieces: Iterable[bytes], *, size: int, sha256: str | None
    ) -> None:
        folder = self._parts(upload_id)
        if not folder.is_dir():
            raise _no_upload(key)
        with storage_errors(key):
            write_atomically(folder / f"{number}", exactly(key, pieces, size), key=key, sha256=sha256, durable=False)

    def received_parts(self, key: str, upload_id: str) -> dict[int, int]:
        try:
            entries = self._parts(upload_id).iterdir()
            numbered = ((whole_number(entry.name), entry) for entry in entries)
            return {number: entry.stat().st_size for number, entry in numbered if number is not None}
        except FileNotFoundError:
            return {}

    def complete_upload(
        self, key: str, upload_id: str, *, size: int, sha256: str, part_sha256: Sequence[str] = ()
    ) -> None:
        folder = self._parts(upload_id)
        with storage_errors(key), _locked(folder) as still_there:
            if not still_there:
                done = self.stat(key)
                if done is None or done.size != size:
                    raise _no_upload(key)
                return
            parts = [folder / str(number) for number in sorted(self.received_parts(key, upload_id))]
            try:
                self._write(key, _joined(parts), sha256)
            except NightpressError as error:
                if error.code is ErrorCode.CHECKSUM_MISMATCH:  # after a full disk the parts stay, for another try
                    shutil.rmtree(folder, ignore_errors=True)
                raise
            shutil.rmtree(folder, ignore_errors=True)

    def abort_upload(self, key: str, upload_id: str) -> None:
        shutil.rmtree(self._parts(upload_id), ignore_errors=True)

    def sweep_uploads(self, older_than_s: float) -> int:
        limit = self._clock() - older_than_s
        uploads = self.root / _UPLOADS
        leftovers = [*uploads.glob("*"), *(path for path in self.root.rglob(f"{OWN}*") if path != uploads)]
        count = 0
        for path in leftovers:
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < limit:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                    count += 1
        return count

    def check(self) -> None:
        with storage_errors("the storage folder"):
            self.root.mkdir(parents=True, exist_ok=True)
            probe = self.root / f"{OWN}check-{secrets.token_hex(4)}"
            probe.write_bytes(b"x")
            probe.unlink()

    # ---------------------------------------------------------------------------------------------------------------

    def _clock(self) -> float:
        """The file system's time as a Unix time. Files' times are compared with it, because the folder may be on another host."""
        with storage_errors("the storage folder"):
            self.root.mkdir(parents=True, exist_ok=True)
            probe = self.root / f"{OWN}clock-{secrets.token_hex(4)}"
            probe.touch()
            now = probe.stat().st_mtime
            probe.unlink()
        return now

    def _path(self, key: str) -> Path:
        return self.root / valid_key(key)

    def _parts(self, upload_id: str) -> Path:
        return self.root / _UPLOADS / valid_key(upload_id)

    def _open(self, key: str) -> BinaryIO:
        try:
            return self._path(key).open("rb")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise missing_object(key) from error

    def _write(self, key: str, pieces: Iterable[bytes], sha256: str | None) -> None:
        write_atomically(self._path(key), pieces, key=key, sha256=sha256, durable=True)

    def _prune(self, folder: Path) -> None:
        """Remove the folders that a deletion left empty, but keep the store's root and the folders directly below it."""
        while folder != self.root and folder.parent != self.root:
            try:
                folder.rmdir()
            except OSError:
                return
            folder = folder.parent


def _pieces(source: BinaryIO, on_bytes: OnBytes | None, *, limit: int | None = None) -> Iterator[bytes]:
    while limit is None or limit > 0:
        piece = source.read(_PIECE if limit is None else min(_PIECE, limit))
        if not piece:
            return
        if limit is not None:
            limit -= len(piece)
        yield piece
        if on_bytes is not None:
            on_bytes(len(piece))


def _joined(parts: Iterable[Path]) -> Iterator[bytes]:
    for part in parts:
        with part.open("rb") as source:
            yield from _pieces(source, None)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold an exclusive lock on the folder, against other processes. Yields False if the folder does not exist (any more)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield folder.is_dir()
    finally:
        os.close(handle)


def _no_upload(key: str) -> NightpressError:
    return NightpressError(
        ErrorCode.NOT_FOUND,
        f"There is no open upload of {key}.",
        hint="It was completed, aborted or swept away.",
        key=key,
    )


def _info(key: str, info: os.stat_result) -> ObjectInfo:
    return ObjectInfo(key, info.st_size, dt.datetime.fromtimestamp(info.st_mtime, dt.UTC))
