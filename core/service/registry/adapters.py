"""Finds the registered model that an adapter was trained for, and what the two are together."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Engine, Row, Select, select
from sqlalchemy.engine import Connection

from nightpress.core.database import transaction
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.manifest import FileEntry, digest_of
from nightpress.core.recipes.adapters import ADAPTER_DIR, AdapterHeader, read_adapter
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.models import plain_name
from nightpress.core.service.registry.registry import TakesLonger
from nightpress.core.service.tables.registry import models
from nightpress.core.settings import Settings
from nightpress.core.sources.address import HubAddress, parse_address

#: (tenant, name, address) → id of a new row, which the control process will fetch.
Fetch = Callable[[str, str, str], str]


@dataclass(frozen=True)
class Fitted:
    """A base and its adapter, which fit together."""

    base_id: str
    digest: str  #: of the base's files and the adapter's
    header: ModelHeader  #: of the base


class Bases:
    """The models that adapters are merged into. Every method sees only the rows of its tenant."""

    def __init__(self, engine: Engine, settings: Settings, fetch: Fetch) -> None:
        self._engine = engine
        self._settings = settings
        self._fetch = fetch

    def named(self, tenant_id: str, reference: str) -> str:
        """The id of the base that a person has named by id, name or address. An address that is not registered is fetched.

        Raises NightpressError: not_found, conflict if it has failed, unsupported_format if it is an adapter, and what `parse_address` raises.
        """
        if "://" in reference:
            return self._at_address(tenant_id, reference)
        row = self._newest(tenant_id, models.c.id == reference) or self._newest(tenant_id, models.c.name == reference)
        if row is None:
            raise NightpressError(
                ErrorCode.NOT_FOUND,
                f"There is no model {reference[:128]!r} to merge the adapter into.",
                hint="Register the model that the adapter was trained for first. GET /v1/models lists those there are.",
            )
        _check_usable(row)
        return str(row.id)

    def fit(self, tenant_id: str, base_id: str | None, files: Sequence[FileEntry], adapter: AdapterHeader) -> Fitted:
        """Match an adapter with its base. files: the adapter's. base_id: None if nobody named it, so that peft's note of it is followed.

        Raises TakesLonger while the base is not ready. Raises NightpressError: unsupported_format if the base is not here, or if the
        adapter can't be merged exactly; malformed_model if it does not fit; conflict if the base has failed or is gone.
        """
        base_id = base_id or self._noted(tenant_id, adapter)
        query = select(models).where(models.c.id == base_id, models.c.tenant_id == tenant_id)
        with transaction(self._engine, read_only=True) as connection:
            row = connection.execute(query).one_or_none()
        if row is None or row.deleted_at is not None:
            raise _gone(base_id)
        _check_usable(row)
        if row.state != "ready":
            raise TakesLonger(f"the adapter's base {row.name} is {row.state}")
        header = ModelHeader.model_validate(row.header)
        read_adapter(adapter.config, adapter.tensors, header.tensors)
        base_files = [FileEntry.model_validate(file) for file in row.files]
        return Fitted(base_id, digest_of([*base_files, *below_base(files)]), header)

    def _noted(self, tenant_id: str, adapter: AdapterHeader) -> str:
        """The base that peft noted: a registered model from this repository or of this name, or else the repository itself."""
        noted = adapter.trained_on
        if noted is None:
            raise _not_named("its adapter_config.json names none")
        from_repository = models.c.source_url.startswith(f"hf://{noted}@{adapter.revision or ''}", autoescape=True)
        names = [noted, plain_name(noted.rstrip("/").rpartition("/")[2])]
        for wanted in (from_repository, models.c.name == names[0], models.c.name == names[1]):
            if (row := self._newest(tenant_id, wanted, models.c.base_id.is_(None))) is not None:
                return str(row.id)
        try:
            return self._at_address(tenant_id, f"hf://{noted}@{adapter.revision or 'main'}")
        except NightpressError as error:
            raise _not_named(f"{noted[:200]!r}, which its adapter_config.json names, is not registered here") from error

    def _at_address(self, tenant_id: str, raw: str) -> str:
        address = parse_address(raw, "models", self._settings)
        row = self._newest(tenant_id, models.c.source_url == address.url, models.c.base_id.is_(None))
        if row is not None:
            return str(row.id)
        path = address.repository if isinstance(address, HubAddress) else f"{address.bucket}/{address.key}"
        return self._fetch(tenant_id, plain_name(path.rpartition("/")[2]), address.url)

    def _newest(self, tenant_id: str, *wanted: ColumnElement[bool]) -> Row[Any] | None:
        """The newest ready row, or else the newest that may become ready, or else the newest."""
        columns = models.c
        known: Select[Any] = select(columns.id, columns.name, columns.state, columns.base_id, columns.error)
        query = known.where(columns.tenant_id == tenant_id, columns.deleted_at.is_(None), *wanted)
        order = ((columns.state == "ready").desc(), (columns.state == "failed"), columns.created_at.desc())
        with transaction(self._engine, read_only=True) as connection:
            return connection.execute(query.order_by(*order, columns.id.desc()).limit(1)).one_or_none()


def below_base(files: Iterable[FileEntry]) -> list[FileEntry]:
    """An adapter's files at their place in a folder with its base."""
    return [file.model_copy(update={"path": f"{ADAPTER_DIR}/{file.path}"}) for file in files]


def hold_base(connection: Connection, columns: Mapping[str, Any]) -> None:
    """Keep the base that a row is about to name from being deleted before the transaction ends. Raises conflict if it is gone."""
    base_id = columns.get("base_id")
    if base_id is None:
        return
    there = select(models.c.id).where(models.c.id == base_id, models.c.deleted_at.is_(None))
    if connection.execute(there.with_for_update(read=True)).one_or_none() is None:
        raise _gone(str(base_id))


def adapter_on(connection: Connection, base_id: str) -> str | None:
    """The name of an adapter that needs this base; None if there is none."""
    query = select(models.c.name).where(
        models.c.base_id == base_id, models.c.deleted_at.is_(None), models.c.state != "failed"
    )
    return connection.execute(query.limit(1)).scalar_one_or_none()


def no_adapter() -> NightpressError:
    return NightpressError(
        ErrorCode.INVALID_REQUEST,
        "`base` is given, and what is brought is no adapter of peft.",
        hint="Leave `base` out for a whole model. An adapter's folder has adapter_config.json and adapter_model.safetensors.",
    )


def _check_usable(row: Row[Any]) -> None:
    if row.base_id is not None:
        raise NightpressError(
            ErrorCode.UNSUPPORTED_FORMAT,
            f"The base {row.name} is an adapter itself, and adapters on adapters are not merged here.",
            hint="Merge the first with `nightpress convert ADAPTER --base MODEL_FOLDER --out NEW_FOLDER`, and bring the new folder as the base.",
        )
    if row.state == "failed":
        raise NightpressError(
            ErrorCode.CONFLICT,
            f"The adapter's base {row.name} failed: {(row.error or {}).get('message', '')}",
            hint="Bring the base again, and then the adapter.",
        )


def _gone(base_id: str) -> NightpressError:
    return NightpressError(
        ErrorCode.CONFLICT,
        f"The adapter's base {base_id} is not registered any more.",
        hint="Bring the base again, and then the adapter.",
    )


def _not_named(why: str) -> NightpressError:
    return NightpressError(
        ErrorCode.UNSUPPORTED_FORMAT,
        f"The folder is an adapter (LoRA) without the model that it adapts: {why}.",
        hint="Register that model first, and name it as the adapter's `base` (`--base`): its id, its name, or its hf:// or s3:// address.",
    )
