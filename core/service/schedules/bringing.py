"""Gets the model of a schedule's source ready: reads the source's revision, and has the model fetched unless it is registered already."""

import logging
import time

from nightpress.core.artifacts.files import storage_errors
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.inspect import FolderFiles
from nightpress.core.service.registry.models import ModelRegistry
from nightpress.core.service.schedules.store import PendingRun, ScheduleStore
from nightpress.core.settings import Settings
from nightpress.core.sources.address import parse_address, resolve_path
from nightpress.core.sources.open import open_source
from nightpress.core.sources.source import revision_of
from nightpress.core.wire.models import ModelCreate, ModelView

_REST_S = 30.0  #: seconds before a source that did not answer is read again

log = logging.getLogger(__name__)


class Bringer:
    """Gets the models of pending runs. It is called at every tick: it reads the source once, then polls the registry."""

    def __init__(self, schedules: ScheduleStore, models: ModelRegistry, settings: Settings) -> None:
        self._schedules = schedules
        self._models = models
        self._settings = settings
        self._rests: dict[str, float] = {}

    def look(self, run: PendingRun) -> str | None:
        """The source's current revision. None: it failed less than `_REST_S` seconds ago, and is not read again yet."""
        assert run.source is not None
        if time.monotonic() < self._rests.get(run.id, 0.0):
            return None
        try:
            return self._revision(run.source)
        except NightpressError:
            self._rests = {key: until for key, until in self._rests.items() if until > time.monotonic()}
            self._rests[run.id] = time.monotonic() + _REST_S
            raise

    def begin(self, run: PendingRun, revision: str) -> None:
        """Register this revision under the model name of the schedule's job, unless it is registered already."""
        assert run.source is not None
        name = run.job.model
        if run.source.startswith("/"):
            model = self._models.create(run.tenant_id, ModelCreate(name=name, path=run.source))
            made = True
        else:
            url = parse_address(run.source, "models", self._settings).url
            found = self._models.fetched(run.tenant_id, name, url, revision)
            model, made = found or self._models.fetch(run.tenant_id, name, url, revision), found is None
        if not self._schedules.bring(run.id, model.id, revision) and made:
            self._models.delete(run.tenant_id, model.id)  # another replica was faster

    def ready(self, run: PendingRun) -> ModelView | None:
        """The run's model, or None while it is being fetched or verified. Raises its error if it failed."""
        assert run.model_id is not None
        model = self._models.get(run.tenant_id, run.model_id)
        if model.state == "failed":
            raise NightpressError.from_dict(model.error or {})
        return model if model.state == "ready" else None

    def _revision(self, raw: str) -> str:
        if raw.startswith("/"):
            path = resolve_path(raw, self._settings)
            if not path.is_dir():
                raise NightpressError(
                    ErrorCode.NOT_FOUND, f"There is no folder {raw} on the server.", hint="Name the model's folder."
                )
            with storage_errors(raw):
                files = FolderFiles(path)
                lines = [
                    f"{name}\0{size}\0{files.path(name).stat().st_mtime_ns}" for name, size in files.names().items()
                ]
            return revision_of(lines)
        source = open_source(parse_address(raw, "models", self._settings), self._settings)
        try:
            return source.listing().revision
        finally:
            source.close()
