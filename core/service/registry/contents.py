"""The files of a registered model or data set and their location, for workers."""

from dataclasses import dataclass, replace
from pathlib import Path

from sqlalchemy import Engine, Table, select

from nightpress.core.database import transaction
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.manifest import FileEntry
from nightpress.core.recipes.adapters import ADAPTER_DIR
from nightpress.core.service.registry.adapters import below_base
from nightpress.core.service.tables.registry import data_sets, models


@dataclass(frozen=True)
class Contents:
    """The files are at `server_path` (a folder or file of the machine) or, if that is None, below `prefix` in object storage.

    folder: where they go in a job's folder of the model; empty: to its top.
    """

    files: tuple[FileEntry, ...]
    prefix: str
    server_path: Path | None
    folder: str = ""

    def placed(self) -> list[FileEntry]:
        """The files with their paths in a job's folder of the model."""
        return below_base(self.files) if self.folder else list(self.files)


def model_contents(engine: Engine, model_id: str) -> tuple[Contents, ...]:
    """The files of a model; of an adapter, its base's and its own. Raises NightpressError(not_found) if there is no such model."""
    own = _contents(engine, models, "models", model_id)
    query = select(models.c.base_id).where(models.c.id == model_id)
    with transaction(engine, read_only=True) as connection:
        base_id = connection.scalar(query)
    if base_id is None:
        return (own,)
    return _contents(engine, models, "models", base_id), replace(own, folder=ADAPTER_DIR)


def data_set_contents(engine: Engine, data_set_id: str) -> Contents:
    """The files of a data set. Raises NightpressError(not_found) if there is no such data set."""
    return _contents(engine, data_sets, "datasets", data_set_id)


def _contents(engine: Engine, table: Table, kind: str, row_id: str) -> Contents:
    query = select(table.c.files, table.c.server_path).where(table.c.id == row_id)
    with transaction(engine, read_only=True) as connection:
        row = connection.execute(query).one_or_none()
    if row is None:
        raise NightpressError(ErrorCode.NOT_FOUND, f"{row_id} is not registered any more.", hint="Submit again.")
    files = tuple(FileEntry.model_validate(file) for file in row.files)
    return Contents(files, f"{kind}/{row_id}", Path(row.server_path) if row.server_path else None)
