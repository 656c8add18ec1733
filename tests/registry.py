"""Registries of models and data sets, for tests: what is announced to them, what they store and what they refuse."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from nightpress.core.artifacts.open import open_store
from nightpress.core.artifacts.storage import ObjectStore
from nightpress.core.database import make_engine
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.manifest import describe_folder
from nightpress.core.service.registry.datasets import DataSetRegistry
from nightpress.core.service.registry.intake import Intake
from nightpress.core.service.registry.models import ModelRegistry
from nightpress.core.settings import Settings
from nightpress.core.wire.models import DataSetView, FileAnnouncement, ModelCreate, ModelView
from tests.service import eventually

TENANT = "default"


def announced(path: str, data: bytes) -> FileAnnouncement:
    return FileAnnouncement(path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest())


def announce(folder: Path) -> ModelCreate:
    files = [FileAnnouncement(**entry.model_dump()) for entry in describe_folder(folder)]
    return ModelCreate(name="tiny", files=files)


def code_of(error: pytest.ExceptionInfo[NightpressError]) -> ErrorCode:
    assert error.value.hint, "an error says what to do"
    return error.value.code


def stored(store: ObjectStore) -> list[str]:
    return [info.key for info in store.list("")]


class World:
    """The registries of one installation, and an intake that the test drives."""

    def __init__(self, folder: Path, sql_url: str, **more: Any) -> None:
        self.settings = Settings(_env_file=None, data_dir=folder / "np", database_url=sql_url, **more)
        self.engine = make_engine(sql_url)
        self.objects: ObjectStore = open_store(self.settings)
        self.models = ModelRegistry(self.engine, self.objects, self.settings)
        self.data_sets = DataSetRegistry(self.engine, self.objects, self.settings)
        self.intakes: list[Intake] = []

    def intake(self) -> Intake:
        return self.patient_intake()

    def patient_intake(self, **patience: float) -> Intake:
        self.intakes.append(Intake(self.engine, (self.models, self.data_sets), **patience))
        return self.intakes[-1]

    def fetch(self, source: str, name: str = "m") -> ModelView:
        made = self.models.create(TENANT, ModelCreate(name=name, source=source))
        assert made.state == "fetching"
        return self.settled(made.id)

    def settled(self, model_id: str) -> ModelView:
        intake = self.intake()

        def over() -> ModelView | None:
            intake.advance()
            model = self.models.get(TENANT, model_id)
            return model if model.state in {"ready", "failed"} else None

        return eventually(over)

    def close(self) -> None:
        for intake in self.intakes:
            intake.close()
        self.engine.dispose()


def refusal(model: ModelView | DataSetView) -> tuple[str, str]:
    assert (model.state, model.digest) == ("failed", None)
    assert model.error is not None
    return model.error["code"], f"{model.error['message']} {model.error['hint']}"
