"""The registry of models."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, Row, select
from sqlalchemy.engine import Connection

from nightpress.core.artifacts.files import storage_errors
from nightpress.core.artifacts.storage import ObjectStore, OnBytes
from nightpress.core.database import transaction
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.manifest import FileEntry
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.inspect import FolderFiles, inspect_adapter, inspect_model
from nightpress.core.recipes.model_files import ModelFiles
from nightpress.core.recipes.other_kinds import is_adapter
from nightpress.core.recipes.possible import Possibility, possibilities
from nightpress.core.recipes.selection import select_adapter, select_files
from nightpress.core.service.registry.adapters import Bases, adapter_on, hold_base, no_adapter
from nightpress.core.service.registry.fetching import FetchingRegistry
from nightpress.core.service.registry.needs import live_jobs, needed_by_a_job
from nightpress.core.service.registry.registry import (
    Taken,
    check_size,
    describe_files,
    shared_fields,
)
from nightpress.core.service.registry.uploads import Owner
from nightpress.core.service.tables.jobs import jobs
from nightpress.core.service.tables.registry import models
from nightpress.core.settings import Settings
from nightpress.core.sources.address import resolve_path
from nightpress.core.sources.selection import choose_model_files
from nightpress.core.sources.source import Listing, RemoteFile, Source
from nightpress.core.wire.models import FileView, ModelCreate, ModelView

_ADAPTER = "adapter"  #: the key of an adapter's header among the facts of its files; no column


class ModelRegistry(FetchingRegistry[ModelView]):
    """The models of the tenants. A model is inspected before it becomes ready, and never changes afterwards."""

    kind = "models"
    noun = "model"
    id_prefix = "mdl"
    upload_column = "model_id"
    table = models

    def __init__(self, engine: Engine, store: ObjectStore, settings: Settings) -> None:
        super().__init__(engine, store, settings)
        self._bases = Bases(engine, settings, lambda tenant_id, name, url: self.fetch(tenant_id, name, url).id)

    def create(self, tenant_id: str, request: ModelCreate) -> ModelView:
        """Announce files to upload, name a source to fetch, or register a folder on the server.

        A small folder on the server is inspected and hashed at once; a large one by the control process.
        """
        if [bool(request.files), request.path is not None, request.source is not None].count(True) != 1:
            raise NightpressError(
                ErrorCode.INVALID_REQUEST,
                "A model is announced with exactly one of `files`, `path` and `source`.",
                hint="`files` are uploaded, `path` names a folder on the server, `source` a place to fetch them from.",
            )
        if request.source is not None:
            return self.fetch(tenant_id, request.name, request.source, **self._base(tenant_id, request))
        if request.path is not None:
            return self._create_from_path(tenant_id, request, request.path)
        sizes = {file.path: file.size for file in request.files}
        if len(sizes) != len(request.files):
            raise NightpressError(ErrorCode.INVALID_REQUEST, "A file is announced twice.", hint="Name each path once.")
        if request.base is not None and not is_adapter(sizes):
            raise no_adapter()
        chosen = select_adapter(sizes) if is_adapter(sizes) else select_files(sizes, None)
        files = [file for file in request.files if file.path in chosen.files]
        check_size(self.noun, sum(file.size for file in files), self._limit)
        base = self._base(tenant_id, request)
        return self._begin(tenant_id, request.name, files, left_out=list(chosen.left_out), **base)

    def header(self, model_id: str) -> ModelHeader:
        """The header that a plan needs. The caller must have checked the tenant with `get`. Raises not_found, conflict."""
        with transaction(self._engine, read_only=True) as connection:
            row = connection.execute(
                select(models.c.name, models.c.state, models.c.header).where(
                    models.c.id == model_id, models.c.deleted_at.is_(None)
                )
            ).one_or_none()
        if row is None:
            raise self._missing(model_id)
        if row.state != "ready":
            raise NightpressError(
                ErrorCode.CONFLICT, f"The model {row.name} is {row.state}.", hint="Complete its upload first."
            )
        return ModelHeader.model_validate(row.header)

    def possible(self, tenant_id: str, reference: str) -> tuple[Possibility, ...]:
        """Which passes and exports a model can have. Raises not_found, conflict."""
        return possibilities(self.header(self.get(tenant_id, reference).id))

    def _base(self, tenant_id: str, request: ModelCreate) -> dict[str, Any]:
        """The column of the base that a request names for an adapter."""
        return {} if request.base is None else {"base_id": self._bases.named(tenant_id, request.base)}

    def _create_from_path(self, tenant_id: str, request: ModelCreate, raw: str) -> ModelView:
        path = resolve_path(raw, self._settings)
        if not path.is_dir():
            raise _no_folder(raw)
        with storage_errors(raw):
            sizes = self._files_at(path).names()
        if request.base is not None and not is_adapter(sizes):
            raise no_adapter()
        return self._register(tenant_id, request.name, path, sum(sizes.values()), **self._base(tenant_id, request))

    def _files_at(self, path: Path) -> FolderFiles:
        """The files of a server folder. Raises path_not_allowed if a symbolic link leads outside what the operator allowed."""
        files = FolderFiles(path)
        for name in files.names():
            resolve_path(str(files.path(name)), self._settings)
        return files

    def _examine_path(self, path: Path, on_bytes: OnBytes, *, at_once: bool = False) -> Taken:  # noqa: ARG002
        if not path.is_dir():
            raise _no_folder(str(path))
        with storage_errors(str(path)):
            files = self._files_at(path)
            sizes = files.names()
            check_size(self.noun, sum(sizes.values()), self._limit)
            facts = _facts_of(files)
            left_out = list(files.selection().left_out)
        return describe_files(path, sizes, files.open, on_bytes), {**facts, "left_out": left_out}

    def _choose(self, source: Source, listing: Listing) -> tuple[Sequence[RemoteFile], Mapping[str, Any]]:
        chosen, left_out = choose_model_files(source, listing)
        return chosen, {"left_out": list(left_out)}

    def _verify_upload(self, row: Row[Any], on_bytes: OnBytes, *, at_once: bool = False) -> Taken:
        """As for all uploads. What turns out not to be needed, e.g. shards that the index doesn't name, is deleted again."""
        files, facts = super()._verify_upload(row, on_bytes, at_once=at_once)
        if _ADAPTER in facts:
            return files, facts
        owner = self._owner(row.id)
        chosen = select_files([file.path for file in files], lambda path: b"".join(self._store.read(owner.key(path))))
        for path in {file.path for file in files} - set(chosen.files):
            self._store.delete_prefix(owner.key(path))
        left_out = sorted({*(row.left_out or ()), *chosen.left_out})
        return [file for file in files if file.path in chosen.files], {**facts, "left_out": left_out}

    @property
    def _limit(self) -> int:
        return self._settings.max_model_bytes

    def _examine_stored(self, owner: Owner, files: Sequence[FileEntry], *, at_once: bool = False) -> dict[str, Any]:  # noqa: ARG002
        return _facts_of(_StoredFiles(self._store, owner.prefix, {file.path: file.size for file in files}))

    def _ready_columns(
        self, tenant_id: str, announced: Mapping[str, Any], files: Sequence[FileEntry], facts: Mapping[str, Any]
    ) -> dict[str, Any]:
        """As for all rows. An adapter has the header of its base, and a digest of both."""
        adapter = facts.get(_ADAPTER)
        base_id = announced.get("base_id")
        if adapter is None:
            if base_id is not None:
                raise no_adapter()
            return super()._ready_columns(tenant_id, announced, files, facts)
        fitted = self._bases.fit(tenant_id, base_id, files, adapter)
        beside = {key: value for key, value in facts.items() if key != _ADAPTER}
        both = {"base_id": fitted.base_id, "digest": fitted.digest, **_facts(fitted.header)}
        return super()._ready_columns(tenant_id, announced, files, beside) | both

    def _hold(self, connection: Connection, columns: Mapping[str, Any]) -> None:
        hold_base(connection, columns)

    def _check_not_needed(self, connection: Connection, row: Row[Any]) -> None:
        query = select(jobs.c.id).where(jobs.c.tenant_id == row.tenant_id, jobs.c.model_id == row.id, live_jobs())
        if connection.execute(query.limit(1)).one_or_none() is not None:
            raise needed_by_a_job(self.noun, row.name)
        if (name := adapter_on(connection, row.id)) is not None:
            raise NightpressError(
                ErrorCode.CONFLICT,
                f"The adapter {name} needs the model {row.name}, which it is merged into.",
                hint="Delete the adapter first.",
            )

    def _view(self, row: Row[Any]) -> ModelView:
        return ModelView(
            **shared_fields(row),
            architecture=row.architecture,
            model_type=row.model_type,
            task=row.task,
            parameters=row.parameters,
            files=[FileView.model_validate(entry) for entry in row.files],
            base_id=row.base_id,
            left_out=row.left_out or [],
        )


def _no_folder(raw: str) -> NightpressError:
    return NightpressError(
        ErrorCode.NOT_FOUND, f"There is no folder {raw} on the server.", hint="Name the model's folder."
    )


def _facts_of(files: ModelFiles) -> dict[str, Any]:
    """The columns that describe a model; of an adapter, which has them from its base, its header."""
    if is_adapter(files.names()):
        return {_ADAPTER: inspect_adapter(files)}
    return _facts(inspect_model(files))


def _facts(header: ModelHeader) -> dict[str, Any]:
    return {
        "architecture": header.architecture,
        "model_type": header.model_type,
        "task": header.task,
        "parameters": header.parameters,
        "header": header.model_dump(mode="json"),
    }


class _StoredFiles:
    """A model in the object store, in the form that `inspect_model` reads."""

    def __init__(self, store: ObjectStore, prefix: str, sizes: Mapping[str, int]) -> None:
        self._store = store
        self._prefix = prefix
        self._sizes = sizes

    def names(self) -> Mapping[str, int]:
        return self._sizes

    def read(self, path: str, offset: int, size: int) -> bytes:
        return b"".join(self._store.read(f"{self._prefix}/{path}", offset, offset + size))
