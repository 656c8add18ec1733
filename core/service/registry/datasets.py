"""The registry of data sets."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Row, select
from sqlalchemy.engine import Connection

from nightpress.core.artifacts.files import storage_errors
from nightpress.core.artifacts.storage import OnBytes
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.manifest import FileEntry
from nightpress.core.paging import cursor_after
from nightpress.core.recipes.calibration import BUILTIN_DATA
from nightpress.core.recipes.datafile import DataFacts, examine_data, kind_of
from nightpress.core.recipes.textfile import READ_BYTES, Window
from nightpress.core.service.registry.fetching import FetchingRegistry
from nightpress.core.service.registry.needs import live_jobs, needed_by_a_job
from nightpress.core.service.registry.registry import (
    Taken,
    TakesLonger,
    check_size,
    describe_files,
    shared_fields,
)
from nightpress.core.service.registry.uploads import Owner
from nightpress.core.service.tables.jobs import jobs
from nightpress.core.service.tables.registry import data_sets
from nightpress.core.sources.address import is_split, parse_address, resolve_path
from nightpress.core.sources.source import Listing, RemoteFile, Source
from nightpress.core.wire.models import DataSetCreate, DataSetView

_PIECE = 1024**2
#: limits on the part of a data set that is read within a request: a few tenths of a second
_AT_ONCE_BYTES = 16 * 1024**2  #: for rows; plain text is read many times faster
_AT_ONCE_LINES = 50_000


class DataSetRegistry(FetchingRegistry[DataSetView]):
    """Data sets of text or labelled rows: those of the tenants, and those that are part of Nightpress."""

    kind = "datasets"
    noun = "data set"
    id_prefix = "dat"
    upload_column = "data_set_id"
    table = data_sets

    def create(self, tenant_id: str, request: DataSetCreate) -> DataSetView:
        """Announce a file to upload, name a source to fetch, or register a file on the server.

        A small file on the server is read and hashed at once; a large one by the control process.
        """
        if [request.file, request.path, request.source].count(None) != 2:
            raise NightpressError(
                ErrorCode.INVALID_REQUEST,
                "A data set is announced with exactly one of `file`, `path` and `source`.",
                hint="`file` is uploaded, `path` names a file on the server, `source` a place to fetch it from.",
            )
        if request.source is not None:
            if not is_split(parse_address(request.source, self.kind, self._settings)):
                kind_of(request.source.rpartition("/")[2])
            return self.fetch(tenant_id, request.name, request.source)
        if request.path is not None:
            return self._create_from_path(tenant_id, request.name, request.path)
        assert request.file is not None
        kind_of(request.file.path)
        check_size(self.noun, request.file.size, self._limit)
        if request.file.size == 0:
            raise NightpressError(
                ErrorCode.INVALID_DATA,
                f"{request.file.path} is empty.",
                hint="A data set needs at least one line of text.",
                file=request.file.path,
            )
        return self._begin(tenant_id, request.name, [request.file])

    def get(self, tenant_id: str, reference: str) -> DataSetView:
        return _builtin(reference) if reference in BUILTIN_DATA else super().get(tenant_id, reference)

    def page(
        self, tenant_id: str, *, cursor: str | None = None, limit: int = 50
    ) -> tuple[list[DataSetView], str | None]:
        left = sorted(BUILTIN_DATA)  # the built-in data sets end the list; their names are cursors
        items: list[DataSetView] = []
        if cursor in BUILTIN_DATA:
            left = left[left.index(cursor) + 1 :]
        else:
            items, following = super().page(tenant_id, cursor=cursor, limit=limit)
            if following is not None:
                return items, following
        shown = left[: limit - len(items)]
        found = items + [_builtin(name) for name in shown]
        if len(shown) == len(left):
            return found, None
        if shown:
            return found, shown[-1]
        last = items[-1]
        assert last.created_at is not None  # only built-in data sets have no such time
        return items, cursor_after(last.created_at, last.id)

    def _create_from_path(self, tenant_id: str, name: str, raw: str) -> DataSetView:
        path = resolve_path(raw, self._settings)
        if not path.is_file():
            raise _no_file(raw)
        kind_of(path.name)
        with storage_errors(raw):
            size = path.stat().st_size
        return self._register(tenant_id, name, path, size)

    def _examine_path(self, path: Path, on_bytes: OnBytes, *, at_once: bool = False) -> Taken:
        if not path.is_file():
            raise _no_file(str(path))
        with storage_errors(str(path)):
            check_size(self.noun, path.stat().st_size, self._limit)
            facts = _examine(path.name, _pieces(path), at_once=at_once)
        return describe_files(path.parent, [path.name], lambda _name: path.open("rb"), on_bytes), facts

    def _choose(self, _source: Source, listing: Listing) -> tuple[Sequence[RemoteFile], Mapping[str, Any]]:
        (file,) = listing.files
        # The folder in its repository or bucket does not matter here.
        kind_of(file.path.rpartition("/")[2])
        return (file,), {}

    @property
    def _limit(self) -> int:
        return self._settings.max_dataset_bytes

    def _examine_stored(self, owner: Owner, files: Sequence[FileEntry], *, at_once: bool = False) -> dict[str, Any]:
        (file,) = files
        return _examine(file.path, self._store.read(owner.key(file.path)), at_once=at_once)

    def _check_not_needed(self, connection: Connection, row: Row[Any]) -> None:
        used = connection.scalars(select(jobs.c.data).where(jobs.c.tenant_id == row.tenant_id, live_jobs()))
        if any(str(entry.get("id")) == row.id for data in used for entry in data.values()):
            raise needed_by_a_job(self.noun, row.name)

    def _view(self, row: Row[Any]) -> DataSetView:
        return DataSetView(
            **shared_fields(row),
            rows=row.rows,
            labelled=None if row.labels is None else row.labels > 0,
        )


def _builtin(name: str) -> DataSetView:
    return DataSetView(
        id=name,
        name=name,
        state="ready",
        digest=None,
        size=0,
        source="builtin",
        rows=None,
        labelled=False,
        created_at=None,
    )


def _no_file(raw: str) -> NightpressError:
    return NightpressError(
        ErrorCode.NOT_FOUND,
        f"There is no file {raw} on the server.",
        hint="Name one .txt, .jsonl, .csv or .parquet file.",
    )


def _examine(name: str, pieces: Iterable[bytes], *, at_once: bool) -> dict[str, Any]:
    """The columns that describe a file's contents. `at_once`: raises TakesLonger if the file is too large to read within a request."""
    window = Window()
    if at_once:
        window = Window(READ_BYTES if kind_of(name) == "txt" else _AT_ONCE_BYTES, _AT_ONCE_LINES)
    facts: DataFacts = examine_data(name, pieces, window)
    if window.hides:
        raise TakesLonger
    return {"rows": facts.rows, "labels": facts.labels}


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as source:
        while piece := source.read(_PIECE):
            yield piece
