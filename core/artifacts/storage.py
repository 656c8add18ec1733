"""The interface to object storage. A key is a plain relative path; a prefix names a whole folder, never a part of a name."""

import datetime as dt
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

PRESIGN_S = 900
OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class ObjectInfo:
    key: str
    size: int
    modified_at: dt.datetime


@dataclass(frozen=True)
class SignedRequest:
    """A PUT that a client sends directly to the store: this URL with exactly these headers."""

    url: str
    headers: dict[str, str]


class ObjectStore(Protocol):
    """A store of objects. Objects are written whole or not at all, and never change.

    The methods raise only NightpressError: storage_unavailable (the store does not answer: try again), checksum_mismatch, not_found,
    disk_full, and the codes that a method names.
    """

    def put_file(self, key: str, path: Path, *, sha256: str | None = None, on_bytes: OnBytes | None = None) -> None:
        """Store a file. If `sha256` is given and the bytes have another digest, raises checksum_mismatch and stores nothing.

        `on_bytes`: called with the number of bytes since its last call.
        """

    def put_bytes(self, key: str, data: bytes) -> None: ...

    def put_pieces(self, key: str, pieces: Iterable[bytes], *, size: int, sha256: str | None = None) -> str:
        """Store the pieces as one object. Only a few pieces are in memory at a time. Returns the object's SHA-256.

        Nothing is stored unless the pieces have exactly `size` bytes in total and, if `sha256` is given, that digest.
        """

    def get_file(self, key: str, path: Path, *, sha256: str | None = None, on_bytes: OnBytes | None = None) -> None:
        """Fetch to `path`, which appears whole or not at all. With `sha256`, raises checksum_mismatch for other bytes."""

    def read(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """The bytes of [start, end), in pieces. If the object is missing, not_found is raised when the first piece is read."""

    def stat(self, key: str) -> ObjectInfo | None: ...

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Every object below a folder, in no promised order. The empty prefix means all."""

    def delete_prefix(self, prefix: str) -> int:
        """Delete the object of this key and every object below this folder. Returns how many there were."""

    def presign_get(self, key: str, *, filename: str, expires_s: int = PRESIGN_S) -> str | None:
        """A URL that downloads the object as `filename`, or None where the caller must stream it."""

    # Uploads by clients, in parts. An upload belongs to one key; the object is not visible until the upload is completed.

    def begin_upload(self, key: str, *, sha256: str, signed_parts: bool) -> str:
        """Open an upload and return the store's id for it. `signed_parts`: every part will be sent with its own SHA-256."""

    def presign_part(
        self, key: str, upload_id: str, number: int, *, size: int, sha256: str | None, expires_s: int = PRESIGN_S
    ) -> SignedRequest | None:
        """Sign the request that sends one part: its number (from 1), its size in bytes and, if given, its SHA-256.

        Returns None if this store takes parts through `receive_part`.
        """

    def receive_part(
        self, key: str, upload_id: str, number: int, pieces: Iterable[bytes], *, size: int, sha256: str | None
    ) -> None:
        """Store one part of exactly `size` bytes.

        Raises payload_too_large for more bytes, invalid_request for fewer, checksum_mismatch for other bytes.
        """

    def received_parts(self, key: str, upload_id: str) -> dict[int, int]:
        """Part number → size in bytes of the parts that were received. Empty after the upload is completed or aborted."""

    def complete_upload(
        self, key: str, upload_id: str, *, size: int, sha256: str, part_sha256: Sequence[str] = ()
    ) -> None:
        """Join the parts and verify the whole object by reading it once. Safe to repeat.

        `part_sha256`: the SHA-256 of every part in order, if the upload was begun with `signed_parts`.
        Raises checksum_mismatch; then both the object and the parts are deleted.
        """

    def abort_upload(self, key: str, upload_id: str) -> None:
        """Delete the parts. A finished object of the same key stays unchanged."""

    def sweep_uploads(self, older_than_s: float) -> int:
        """Delete unfinished uploads and temporary files that are older than `older_than_s` seconds. Returns their number."""

    def check(self) -> None:
        """Raise storage_unavailable unless a test object can be written and deleted now."""
