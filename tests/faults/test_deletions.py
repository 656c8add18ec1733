"""The control process completes a deletion whose process was killed after it changed the row and before it deleted the files."""

import signal
import subprocess
import sys

import pytest
from sqlalchemy import Table, update

from nightpress.core.database import db_now, transaction
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.service.registry.models import ModelRegistry
from nightpress.core.service.tables.registry import models
from tests.service import ROOT, TENANT, Service, eventually

_KILLED_DELETION = """
import os, signal, sys
from nightpress.core.artifacts.open import open_store
from nightpress.core.database import make_engine
from nightpress.core.service.registry.models import ModelRegistry
from nightpress.core.settings import load_settings
settings = load_settings()
store = open_store(settings)
store.delete_prefix = lambda prefix: os.kill(os.getpid(), signal.SIGKILL)
ModelRegistry(make_engine(settings.sql_url), store, settings).delete(sys.argv[1], sys.argv[2])
"""
HOUR = 3600.0


def files_of(service: Service, model_id: str) -> list[str]:
    return [item.key for item in service.objects.list(f"models/{model_id}")]


def set_back(service: Service, table: Table, row_id: str, **seconds: float) -> None:
    with transaction(service.engine) as connection:
        when = {name: db_now(-second) for name, second in seconds.items()}
        connection.execute(update(table).where(table.c.id == row_id).values(when))


def test_a_deletion_that_was_killed_half_way_is_finished_by_the_control_process(service: Service) -> None:
    script = [sys.executable, "-c", _KILLED_DELETION, TENANT, service.model_id]
    killed = subprocess.run(script, cwd=ROOT, env=service.environment(), check=False)
    assert killed.returncode == -signal.SIGKILL
    registry = ModelRegistry(service.engine, service.objects, service.settings)
    with pytest.raises(NightpressError) as gone:
        registry.get(TENANT, service.model_id)
    assert gone.value.code is ErrorCode.NOT_FOUND
    assert len(files_of(service, service.model_id)) == 2, "they leaked"
    set_back(service, models, service.model_id, deleted_at=2 * HOUR)
    service.start_control()
    eventually(lambda: not files_of(service, service.model_id))
    eventually(lambda: registry.sweep_deleted(HOUR) == 0)


def test_what_is_swept_is_over_and_nothing_else(service: Service) -> None:
    registry = ModelRegistry(service.engine, service.objects, service.settings)
    ready = service.model_id
    failed, fresh = (service.register(name, service.settings.data_dir / "upload")[0] for name in ("mdl_a", "mdl_b"))
    for name in (failed, fresh):
        with transaction(service.engine) as connection:
            connection.execute(update(models).where(models.c.id == name).values(state="failed", digest=None))
    set_back(service, models, failed, created_at=2 * HOUR)
    set_back(service, models, ready, created_at=2 * HOUR)
    assert registry.sweep_deleted(HOUR) == 1
    assert [len(files_of(service, name)) for name in (ready, failed, fresh)] == [2, 0, 2]
    assert registry.sweep_deleted(HOUR) == 0, "once is enough"
