"""What a worker reads of a registered model or data set: its files, and where they lie."""

from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine, Table, select

from nightpress.core.database import transaction
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.manifest import FileEntry
from nightpress.core.service.tables.registry import data_sets, models


@dataclass(frozen=True)
class Contents:
    """The files lie at `server_path`, a folder or a file of the machine, or below `prefix` in object storage."""

    files: tuple[FileEntry, ...]
    prefix: str
    server_path: Path | None


def model_contents(engine: Engine, model_id: str) -> Contents:
    """Raises NightpressError(not_found) where the model was deleted meanwhile."""
    return _contents(engine, models, "models", model_id)


def data_set_contents(engine: Engine, data_set_id: str) -> Contents:
    """Raises NightpressError(not_found) where the data set was deleted meanwhile."""
    return _contents(engine, data_sets, "datasets", data_set_id)


def _contents(engine: Engine, table: Table, kind: str, row_id: str) -> Contents:
    query = select(table.c.files, table.c.server_path).where(table.c.id == row_id)
    with transaction(engine, read_only=True) as connection:
        row = connection.execute(query).one_or_none()
    if row is None:
        raise NightpressError(ErrorCode.NOT_FOUND, f"{row_id} is not registered any more.", hint="Submit again.")
    files = tuple(FileEntry.model_validate(file) for file in row.files)
    return Contents(files, f"{kind}/{row_id}", Path(row.server_path) if row.server_path else None)
