"""The common base of models and data sets: upload or registration by server path, lookup by tenant, deletion with their files."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from io import BufferedReader
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import ValidationError
from sqlalchemy import Engine, Row, Select, String, Table, bindparam, func, insert, or_, select, update
from sqlalchemy.engine import Connection

from nightpress.core.artifacts.files import storage_errors
from nightpress.core.artifacts.storage import ObjectStore, OnBytes
from nightpress.core.database import db_now, later_than, transaction
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.manifest import FileEntry, describe_stream, digest_of
from nightpress.core.ids import new_id
from nightpress.core.paging import newest_first
from nightpress.core.service.access.quotas import QuotaBook
from nightpress.core.service.registry.uploads import Owner, Uploads
from nightpress.core.service.tables.registry import UNSWEPT
from nightpress.core.settings import Settings
from nightpress.core.sources.address import Kind
from nightpress.core.wire.models import DataSetView, FileAnnouncement, ModelView, UploadFile

log = logging.getLogger(__name__)

View = TypeVar("View", ModelView, DataSetView)
Taken = tuple[Sequence[FileEntry], Mapping[str, Any]]  #: files, and the columns that describe their contents


class TakesLonger(Exception):  # noqa: N818
    """The files can't be verified within a request. The control process verifies them."""


class Registry(ABC, Generic[View]):
    """The rows of one kind, models or data sets. Every method that takes a tenant sees only the tenant's own rows.

    A reference is an id or a name. A name means its newest ready row or, if none is ready, its newest row.
    """

    kind: ClassVar[Kind]  #: "models" or "datasets": the first part of keys and routes
    noun: ClassVar[str]
    id_prefix: ClassVar[str]
    upload_column: ClassVar[str]
    table: ClassVar[Table]

    def __init__(self, engine: Engine, store: ObjectStore, settings: Settings) -> None:
        self._engine = engine
        self._store = store
        self._settings = settings
        self._uploads = Uploads(engine, store)
        self._quotas = QuotaBook(engine, settings)

    def get(self, tenant_id: str, reference: str) -> View:
        """The row that a reference names. Raises NightpressError(not_found)."""
        return self._view(self._find(tenant_id, reference))

    def page(self, tenant_id: str, *, cursor: str | None = None, limit: int = 50) -> tuple[list[View], str | None]:
        """One page, newest first, and the cursor of the next page or None."""
        table = self.table
        query = self._select().where(table.c.tenant_id == tenant_id)
        rows, following = newest_first(self._engine, query, table.c.created_at, table.c.id, cursor=cursor, limit=limit)
        return [self._view(row) for row in rows], following

    def uploads(self, tenant_id: str, reference: str) -> list[UploadFile]:
        """The parts that are still missing, with fresh URLs. Empty unless the state is `uploading`."""
        row = self._find(tenant_id, reference)
        return self._uploads.pending(self._owner(row.id)) if row.state == "uploading" else []

    def receive_part(
        self, tenant_id: str, reference: str, path: str, number: int, pieces: Iterable[bytes], size: int
    ) -> None:
        """Store one part of one file. Only for stores without presigned URLs."""
        row = self._find(tenant_id, reference)
        self._must_be_uploading(row)
        self._uploads.receive(self._owner(row.id), path, number, pieces, size)

    def complete(self, tenant_id: str, reference: str) -> View:
        """Verify the uploaded files and make the row ready. Safe to repeat.

        Raises conflict while parts are missing. Any other fault of the files makes the row `failed` and deletes the files.
        If verifying takes too long for a request, the row becomes `verifying`, and the control process continues.
        """
        row = self._find(tenant_id, reference)
        if row.state in {"ready", "verifying"}:
            return self._view(row)
        self._must_be_uploading(row)
        owner = self._owner(row.id)
        self._uploads.must_be_whole(owner)
        try:
            if row.size > self._settings.verify_inline_bytes:
                raise TakesLonger
            files, facts = self._verify_upload(row, _ignore, at_once=True)
            ready = self._ready_columns(tenant_id, row._asdict(), files, facts)
        except NightpressError as error:
            if not error.kind.retryable and error.code is not ErrorCode.NOT_FOUND:
                self._fail(row, error)
            raise
        except Exception as error:
            _note_unforeseen(error, self.noun, row.id)
            won = self._advance(row, state="verifying")
            return self.get(tenant_id, row.id) if won else self._as_decided(tenant_id, owner)
        if not self._advance(row, **ready):
            return self._as_decided(tenant_id, owner)
        self._uploads.forget(owner)
        return self.get(tenant_id, row.id)

    def delete(self, tenant_id: str, reference: str) -> None:
        """Delete the row with its stored files and its upload. Files at a server path stay. Raises conflict while it is needed."""
        row = self._find(tenant_id, reference)
        with transaction(self._engine) as connection:
            connection.execute(select(self.table.c.id).where(self.table.c.id == row.id).with_for_update())
            self._check_not_needed(connection, row)
            connection.execute(update(self.table).where(self.table.c.id == row.id).values(deleted_at=db_now()))
        self._uploads.abandon(self._owner(row.id))

    def sweep_abandoned(self, older_than_s: float) -> int:
        """Fail uploads that were not completed within `older_than_s` seconds, and delete their files. Returns their number."""
        table = self.table
        with transaction(self._engine, read_only=True) as connection:
            rows = connection.execute(
                self._select().where(table.c.state == "uploading", table.c.created_at < db_now(-older_than_s))
            ).all()
        error = NightpressError(
            ErrorCode.CONFLICT, "The upload was not completed in time, and was given up.", hint="Upload it again."
        )
        for row in rows:
            self._fail(row, error)
        return len(rows)

    def sweep_deleted(self, older_than_s: float, *, limit: int = 100) -> int:
        """Delete again the files of rows that were deleted or failed more than `older_than_s` seconds ago. Returns the number of rows.

        The row is marked before its files are deleted. A process that was killed in between has left files, and a slow process may have
        stored more files afterwards.
        """
        columns = self.table.c
        over_at = func.coalesce(columns.deleted_at, columns.created_at)
        query = select(columns.id).where(UNSWEPT, over_at < db_now(-older_than_s)).order_by(columns.id).limit(limit)
        with transaction(self._engine, read_only=True) as connection:
            ids = connection.scalars(query).all()
        for row_id in ids:
            self._uploads.abandon(self._owner(row_id))
            with transaction(self._engine) as connection:
                connection.execute(update(self.table).where(columns.id == row_id).values(swept=True))
        return len(ids)

    def _verify_upload(self, row: Row[Any], on_bytes: OnBytes, *, at_once: bool = False) -> Taken:
        owner = self._owner(row.id)
        files = tuple(FileEntry.model_validate(entry) for entry in row.files)
        self._uploads.finish(owner, on_bytes)
        return files, self._examine_stored(owner, files, at_once=at_once)

    # Differs between the two kinds -------------------------------------------------------------------------------

    @abstractmethod
    def _view(self, row: Row[Any]) -> View: ...

    @abstractmethod
    def _examine_stored(self, owner: Owner, files: Sequence[FileEntry], *, at_once: bool = False) -> dict[str, Any]:
        """Validate the stored files and return the columns that describe them. `at_once`: may raise TakesLonger."""

    @abstractmethod
    def _examine_path(self, path: Path, on_bytes: OnBytes, *, at_once: bool = False) -> "Taken":
        """Validate and hash the files at a server path. Raises not_found. `at_once`: may raise TakesLonger."""

    @property
    @abstractmethod
    def _limit(self) -> int:
        """The largest size allowed, in bytes."""

    @abstractmethod
    def _check_not_needed(self, connection: Connection, row: Row[Any]) -> None:
        """Raise NightpressError(conflict) if a job that has not ended, or another row, needs this row."""

    def _ready_columns(
        self,
        tenant_id: str,  # noqa: ARG002
        announced: Mapping[str, Any],  # noqa: ARG002
        files: Sequence[FileEntry],
        facts: Mapping[str, Any],
    ) -> dict[str, Any]:
        """The columns of a row that becomes ready. announced: its columns until now. Raises TakesLonger if it needs a row that is not ready."""
        return ready_columns(files, facts)

    def _hold(self, connection: Connection, columns: Mapping[str, Any]) -> None:
        """Keep the rows that these columns refer to from being deleted before the transaction ends."""

    # ---------------------------------------------------------------------------------------------------------------

    def _begin(self, tenant_id: str, name: str, files: Sequence[FileAnnouncement], **given: Any) -> View:
        """Write a row whose files will be uploaded. given: further columns."""
        self._quotas.check_storage(tenant_id, sum(file.size for file in files))
        owner = self._owner(new_id(self.id_prefix))
        entries = [_entry(file) for file in files]
        rows = self._uploads.open(owner, files)
        try:
            with transaction(self._engine) as connection:
                columns = {"state": "uploading", "source": "upload", **described(entries), **given}
                self._insert(connection, owner.id, tenant_id, name, **columns)
                self._uploads.insert(connection, rows)
        except BaseException:
            self._uploads.abort(owner, ((row["path"], row["store_upload_id"]) for row in rows))
            self._store.delete_prefix(owner.prefix)
            raise
        return self.get(tenant_id, owner.id).model_copy(update={"uploads": self._uploads.pending(owner)})

    def _register(self, tenant_id: str, name: str, server_path: Path, size: int, **more: Any) -> View:
        """Write a row for files that stay at their server path. It is ready at once, unless reading the files takes long. more: columns."""
        row_id = new_id(self.id_prefix)
        given: dict[str, Any] = {"source": "path", "server_path": str(server_path), **more}
        try:
            if size > self._settings.verify_inline_bytes:
                raise TakesLonger
            found = self._examine_path(server_path, _ignore, at_once=True)
            given |= self._ready_columns(tenant_id, given, *found)
        except NightpressError:
            raise
        except Exception as error:
            _note_unforeseen(error, self.noun, row_id)
            given |= {"state": "verifying", "files": [], "size": size}
        with transaction(self._engine) as connection:
            self._insert(connection, row_id, tenant_id, name, **given)
        return self.get(tenant_id, row_id)

    def _insert(self, connection: Connection, row_id: str, tenant_id: str, name: str, **columns: Any) -> None:
        self._hold(connection, columns)
        columns_of = self.table.c
        namesakes = (columns_of.tenant_id == tenant_id, columns_of.name == name)
        created_at = later_than(connection, select(func.max(columns_of.created_at)).where(*namesakes))
        named = {"id": row_id, "tenant_id": tenant_id, "name": name, "created_at": created_at}
        connection.execute(insert(self.table).values({**named, **columns}))

    def _find(self, tenant_id: str, reference: str) -> Row[Any]:
        if not reference.isprintable():
            raise self._missing(reference)
        with transaction(self._engine, read_only=True) as connection:
            row = connection.execute(self._named, {"tenant": tenant_id, "reference": reference}).one_or_none()
        if row is None:
            raise self._missing(reference)
        return row

    @cached_property
    def _named(self) -> Select[Any]:
        """The row that a reference names. Built once: every submission asks it, and building takes as long as asking."""
        columns = self.table.c
        tenant, reference = bindparam("tenant", type_=String), bindparam("reference", type_=String)
        return (
            self._select()
            .where(columns.tenant_id == tenant, or_(columns.id == reference, columns.name == reference))
            .order_by(
                (columns.id == reference).desc(),
                (columns.state == "ready").desc(),
                columns.created_at.desc(),
                columns.id.desc(),
            )
            .limit(1)
        )

    def _missing(self, reference: str) -> NightpressError:
        return NightpressError(
            ErrorCode.NOT_FOUND,
            f"There is no {self.noun} {reference[:128]!r}.",
            hint=f"GET /v1/{self.kind} lists those there are.",
        )

    def _select(self) -> Select[Any]:
        """Select every column but a model's header, which may be long."""
        columns = [column for column in self.table.columns if column.name != "header"]
        return select(*columns).where(self.table.c.deleted_at.is_(None))

    def _owner(self, row_id: str) -> Owner:
        return Owner(self.upload_column, row_id, self.kind)

    def _must_be_uploading(self, row: Row[Any]) -> None:
        if row.state != "uploading":
            raise NightpressError(
                ErrorCode.CONFLICT,
                f"The {self.noun} {row.name} is {row.state}, and takes no more files.",
                hint="What a model or data set consists of never changes: bring a new one."
                if row.state == "ready"
                else "Its `error` says why. Bring it again.",
            )

    def _advance(self, row: Row[Any], **columns: Any) -> bool:
        """Update the row if its state and claim are still those of `row`. False: another process has changed it first."""
        table = self.table
        same = (table.c.state == row.state, table.c.claim_id.is_not_distinct_from(row.claim_id))
        if columns["state"] in {"ready", "failed"}:
            columns |= {"claim_id": None, "claim_until": None}
        with transaction(self._engine) as connection:
            self._hold(connection, columns)
            won = connection.execute(
                update(table).where(table.c.id == row.id, *same, table.c.deleted_at.is_(None)).values(**columns)
            )
            return won.rowcount == 1

    def _as_decided(self, tenant_id: str, owner: Owner) -> View:
        """The row after another request has changed it while this request verified the files."""
        try:
            row = self._find(tenant_id, owner.id)
        except NightpressError:
            self._uploads.abandon(owner)  # deleted: this request may have joined parts after the deletion
            raise
        if row.state not in {"ready", "verifying"}:
            self._must_be_uploading(row)
        return self._view(row)

    def _fail(self, row: Row[Any], error: NightpressError) -> None:
        if self._advance(row, state="failed", error=error.as_dict()):
            self._uploads.abandon(self._owner(row.id))


def ready_columns(files: Sequence[FileEntry], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a row that becomes ready."""
    return {"state": "ready", "progress": 1.0, "digest": digest_of(list(files)), **described(files), **facts}


def described(files: Sequence[FileEntry]) -> dict[str, Any]:
    return {"files": dumped(files), "size": sum(file.size for file in files)}


def dumped(files: Iterable[FileEntry]) -> list[dict[str, Any]]:
    return [file.model_dump() for file in files]


def _note_unforeseen(error: Exception, noun: str, row_id: str) -> None:
    """Log an unexpected error. The caller then treats it like TakesLonger: the control process tries again for a limited time."""
    if not isinstance(error, TakesLonger):
        log.error("The %s %s: an unexpected error", noun, row_id, exc_info=error)


def _ignore(_count: int) -> None:
    """Drops the progress: within a request, no caller can read it."""


def describe_files(
    root: Path, names: Iterable[str], open_file: Callable[[str], BufferedReader], on_bytes: OnBytes
) -> tuple[FileEntry, ...]:
    """Hash files. `names`: paths relative to `root`, which `open_file` opens. `on_bytes` is called with the size of each file.

    Uses two threads: hashing releases the GIL, and more threads would only compete for the disk.
    """

    def describe(name: str) -> FileEntry:
        with open_file(name) as stream:
            found = describe_stream(name, stream)
        on_bytes(found.size)
        return found

    with storage_errors(str(root)), ThreadPoolExecutor(2) as pool:
        return tuple(pool.map(describe, names))


def check_size(noun: str, total: int, limit: int) -> None:
    if total > limit:
        raise NightpressError(
            ErrorCode.PAYLOAD_TOO_LARGE,
            f"The {noun} has {total} bytes; {limit} are allowed here.",
            hint="Bring a smaller one, or ask the operator to raise the limit.",
        )


def _entry(file: FileAnnouncement) -> FileEntry:
    try:
        return FileEntry(path=file.path, size=file.size, sha256=file.sha256)
    except ValidationError as error:
        raise NightpressError(
            ErrorCode.INVALID_REQUEST,
            f"{file.path[:200]!r} is not a plain relative path.",
            hint="Name files relative to the model's folder, with `/` between folders.",
        ) from error


def shared_fields(row: Row[Any]) -> dict[str, Any]:
    """The fields that the views of models and data sets share."""
    return {
        "id": row.id,
        "name": row.name,
        "state": row.state,
        "digest": row.digest,
        "size": row.size,
        "source": row.source,
        "source_url": row.source_url,
        "revision": row.revision,
        "progress": row.progress if row.state in {"fetching", "verifying"} else None,
        "error": row.error,
        "created_at": row.created_at,
    }
