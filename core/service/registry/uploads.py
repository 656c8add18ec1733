"""Uploads: opened at the object store, sent in parts by the client, and usable after the whole file is verified."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from sqlalchemy import ColumnElement, Engine, Row, delete, insert, select, update
from sqlalchemy.engine import Connection

from nightpress.core.artifacts.storage import ObjectStore, OnBytes
from nightpress.core.database import transaction
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.ids import new_id
from nightpress.core.service.tables.registry import uploads
from nightpress.core.wire.models import FileAnnouncement, UploadFile, UploadPart, upload_part_size

_NOTHING = hashlib.sha256(b"").hexdigest()


@dataclass(frozen=True)
class Owner:
    """The model or data set that files belong to."""

    column: str  #: the column of the table uploads that refers to the owner
    id: str
    kind: str  #: "models" or "datasets": the first part of keys and routes

    @property
    def prefix(self) -> str:
        return f"{self.kind}/{self.id}"

    def key(self, path: str) -> str:
        return f"{self.prefix}/{path}"

    def is_mine(self) -> ColumnElement[bool]:
        mine: ColumnElement[bool] = uploads.c[self.column] == self.id
        return mine


class Uploads:
    """The files that a client still has to send for a model or data set. Only the store knows which parts were received."""

    def __init__(self, engine: Engine, store: ObjectStore) -> None:
        self._engine = engine
        self._store = store

    def open(self, owner: Owner, files: Sequence[FileAnnouncement]) -> list[dict[str, Any]]:
        """Open an upload for each file at the store. Returns the rows to insert. If an error occurs, no upload stays open."""
        rows: list[dict[str, Any]] = []
        try:
            for file in files:
                if file.size == 0:
                    self._store_nothing(owner, file)
                else:
                    rows.append(self._open_one(owner, file))
        except BaseException:
            self.abort(owner, ((row["path"], row["store_upload_id"]) for row in rows))
            raise
        return rows

    def insert(self, connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
        if rows:
            connection.execute(insert(uploads), list(rows))

    def pending(self, owner: Owner) -> list[UploadFile]:
        """The parts that were not received yet, by file, with fresh URLs."""
        found = []
        for row in self._rows(owner):
            missing = self._missing(owner, row)
            if missing:
                parts = [self._part(owner, row, number) for number in missing]
                found.append(UploadFile(path=row.path, size=row.size, parts=parts))
        return found

    def receive(self, owner: Owner, path: str, number: int, pieces: Iterable[bytes], size: int) -> None:
        """Store one part. Raises not_found, payload_too_large, invalid_request, checksum_mismatch."""
        row = next((row for row in self._rows(owner) if row.path == path), None)
        if row is None or not 1 <= number <= _part_count(row):
            raise NightpressError(
                ErrorCode.NOT_FOUND,
                f"No part {number} of {path[:200]} is awaited.",
                hint="GET …/uploads lists the parts that are.",
            )
        wanted = _size_of_part(row, number)
        if size != wanted:
            code = ErrorCode.PAYLOAD_TOO_LARGE if size > wanted else ErrorCode.INVALID_REQUEST
            raise NightpressError(
                code, f"Part {number} of {path} has {wanted} bytes, not {size}.", hint="Send exactly the part's bytes."
            )
        self._store.receive_part(
            owner.key(path), row.store_upload_id, number, pieces, size=wanted, sha256=_part_sha256(row, number)
        )

    def must_be_whole(self, owner: Owner) -> None:
        """Raise conflict if parts are missing."""
        rows = self._rows(owner)
        missing = {row.path: parts for row in rows if (parts := self._missing(owner, row))}
        if missing:
            count = sum(len(parts) for parts in missing.values())
            raise NightpressError(
                ErrorCode.CONFLICT,
                f"{count} part{'s' * (count > 1)} of {', '.join(sorted(missing))[:300]} {'have' if count > 1 else 'has'} not come yet.",
                hint="GET …/uploads lists them with fresh addresses; send them, then complete again.",
                missing={path: parts[:100] for path, parts in missing.items()},
            )

    def finish(self, owner: Owner, on_bytes: OnBytes) -> None:
        """Join the parts of every file and verify it. May be called again after an interruption: verified files are not read twice.

        Raises checksum_mismatch if a file has other bytes than announced.
        """
        for row in self._rows(owner):
            self._store.complete_upload(
                owner.key(row.path), row.store_upload_id, size=row.size, sha256=row.sha256, part_sha256=row.part_sha256
            )
            with transaction(self._engine) as connection:
                connection.execute(update(uploads).where(uploads.c.id == row.id).values(verified=True))
            on_bytes(row.size)

    def abandon(self, owner: Owner) -> None:
        """Delete the owner's files and uploads from the store, and its uploads from SQL."""
        with transaction(self._engine, read_only=True) as connection:
            rows = connection.execute(select(uploads.c.path, uploads.c.store_upload_id).where(owner.is_mine())).all()
        self._store.delete_prefix(owner.prefix)
        self.abort(owner, ((row.path, row.store_upload_id) for row in rows))
        self.forget(owner)

    def abort(self, owner: Owner, uploads: Iterable[tuple[str, str]]) -> None:
        for path, store_upload_id in uploads:
            self._store.abort_upload(owner.key(path), store_upload_id)

    def forget(self, owner: Owner) -> None:
        with transaction(self._engine) as connection:
            connection.execute(delete(uploads).where(owner.is_mine()))

    def _open_one(self, owner: Owner, file: FileAnnouncement) -> dict[str, Any]:
        part_size = upload_part_size(file.size)
        count = -(-file.size // part_size)
        part_sha256 = file.part_sha256 or ([file.sha256] if count == 1 else [])
        if part_sha256 and (len(part_sha256) != count or (count == 1 and part_sha256 != [file.sha256])):
            raise NightpressError(
                ErrorCode.INVALID_REQUEST,
                f"{file.path}: `part_sha256` does not fit {count} part{'s' * (count > 1)} of {part_size} bytes.",
                hint="Give the SHA-256 of each part in order, or leave it out.",
            )
        upload_id = self._store.begin_upload(owner.key(file.path), sha256=file.sha256, signed_parts=bool(part_sha256))
        return {
            "id": new_id("up"),
            owner.column: owner.id,
            "path": file.path,
            "size": file.size,
            "sha256": file.sha256,
            "part_size": part_size,
            "part_sha256": part_sha256,
            "store_upload_id": upload_id,
            "verified": False,
        }

    def _store_nothing(self, owner: Owner, file: FileAnnouncement) -> None:
        """Store an empty file, which needs no upload."""
        if file.sha256 != _NOTHING:
            raise NightpressError(
                ErrorCode.CHECKSUM_MISMATCH,
                f"{file.path} is announced as empty, but with another SHA-256 than nothing has.",
                hint="Announce its true size.",
            )
        self._store.put_bytes(owner.key(file.path), b"")

    def _rows(self, owner: Owner) -> Sequence[Row[Any]]:
        with transaction(self._engine, read_only=True) as connection:
            return connection.execute(
                select(uploads).where(owner.is_mine(), uploads.c.verified.is_(False)).order_by(uploads.c.path)
            ).all()

    def _missing(self, owner: Owner, row: Row[Any]) -> list[int]:
        received = self._store.received_parts(owner.key(row.path), row.store_upload_id)
        if not received and self._store.stat(owner.key(row.path)) is not None:
            return []  # already joined, by a call that was interrupted before it had verified the object
        numbers = range(1, _part_count(row) + 1)
        return [number for number in numbers if received.get(number) != _size_of_part(row, number)]

    def _part(self, owner: Owner, row: Row[Any], number: int) -> UploadPart:
        size = _size_of_part(row, number)
        signed = self._store.presign_part(
            owner.key(row.path), row.store_upload_id, number, size=size, sha256=_part_sha256(row, number)
        )
        url = f"/v1/{owner.kind}/{owner.id}/parts/{number}?path={quote(row.path, safe='')}"
        return UploadPart(
            number=number,
            offset=(number - 1) * row.part_size,
            size=size,
            url=signed.url if signed else url,
            headers=signed.headers if signed else {"Content-Length": str(size)},
        )


def _part_count(row: Row[Any]) -> int:
    return int(-(-row.size // row.part_size))


def _size_of_part(row: Row[Any], number: int) -> int:
    return int(min(row.part_size, row.size - (number - 1) * row.part_size))


def _part_sha256(row: Row[Any], number: int) -> str | None:
    return row.part_sha256[number - 1] if row.part_sha256 else None
