"""The standing destinations of a model's name: where each result goes that becomes the latest of the name."""

from sqlalchemy import Engine, insert, select, update

from nightpress.core.database import db_now, lock_until_commit, transaction
from nightpress.core.service.deliveries.addresses import check_destinations
from nightpress.core.service.tables.deliveries import model_destinations
from nightpress.core.settings import Settings
from nightpress.core.versions import changed_since
from nightpress.core.wire.deliveries import ModelDestinationsView

_columns = model_destinations.c


class ModelDestinationStore:
    """Standing destinations of all tenants."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._settings = settings

    def get(self, tenant_id: str, model_name: str) -> ModelDestinationsView:
        """The destinations of a name; none if none were set."""
        mine = (_columns.tenant_id == tenant_id, _columns.model_name == model_name)
        with transaction(self._engine, read_only=True) as connection:
            row = connection.execute(select(model_destinations).where(*mine)).one_or_none()
        if row is None:
            return ModelDestinationsView(model=model_name, destinations=[], version=0)
        return ModelDestinationsView(model=model_name, **row._mapping)

    def set(
        self,
        tenant_id: str,
        model_name: str,
        destinations: list[str],
        *,
        version: int | None = None,
        key_id: str | None = None,
    ) -> ModelDestinationsView:
        """Replace the destinations of a name. Raises invalid_request, path_not_allowed, precondition_failed."""
        check_destinations(destinations, self._settings, model=model_name)
        mine = (_columns.tenant_id == tenant_id, _columns.model_name == model_name)
        given = {"destinations": destinations, "set_by": key_id, "set_at": db_now()}
        with transaction(self._engine) as connection:
            lock_until_commit(connection, f"destinations/{tenant_id}/{model_name}")
            present = connection.execute(select(_columns.version).where(*mine)).scalar_one_or_none()
            if version is not None and version != (present or 0):
                raise changed_since()
            if present is None:
                row = {"tenant_id": tenant_id, "model_name": model_name, "version": 1}
                connection.execute(insert(model_destinations).values(**row, **given))
            else:
                changed = update(model_destinations).where(*mine)
                connection.execute(changed.values(version=_columns.version + 1, **given))
        return self.get(tenant_id, model_name)
