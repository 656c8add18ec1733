"""Every column of models, data sets and uploads: the code under test writes a different value to each, and the test reads it back."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from nightpress.core.artifacts.open import open_store
from nightpress.core.service.registry.datasets import DataSetRegistry
from nightpress.core.service.registry.intake import Intake
from nightpress.core.service.registry.models import ModelRegistry
from nightpress.core.service.tables.registry import data_sets, models, uploads
from nightpress.core.settings import Settings
from nightpress.core.wire.models import DataSetCreate, FileAnnouncement, ModelCreate
from tests.columns import DIGEST, MAPPING, Chosen, Rows, identifier

COVERED = {data_sets, models, uploads}
#: the columns of a model or data set that has not been examined yet
UNKNOWN: dict[str, Any] = {
    "server_path": None,
    "source_url": None,
    "revision": None,
    "progress": 0.0,
    "claim_id": None,
    "claim_until": None,
    "digest": None,
    "files": [],
    "error": None,
    "deleted_at": None,
    "swept": False,
}
UNKNOWN_MODEL = {
    "architecture": None,
    "model_type": None,
    "task": None,
    "parameters": None,
    "header": None,
    "base_id": None,
    "left_out": None,
}
UNKNOWN_DATA = {"rows": None, "labels": None}
FACTS: dict[str, Any] = {
    "architecture": "BertForMaskedLM",
    "model_type": "bert",
    "task": "masked-lm",
    "parameters": Chosen("<parameters>", lambda value: value > 1_000_000),
    "header": MAPPING,
    "base_id": None,
    "left_out": [],
}


@pytest.mark.parametrize("kind", ["models", "datasets"])
def test_models_and_data_sets(
    engine: Engine, rows: Rows, tmp_path: Path, sql_url: str, bert_tiny: Path, kind: str
) -> None:
    (tmp_path / "lines.jsonl").write_text('{"text": "good", "label": 1}\n{"text": "bad", "label": 0}\n' * 2)
    roots = [bert_tiny.parent, tmp_path]
    settings = Settings(
        _env_file=None, data_dir=tmp_path / "home", model_roots=roots, hub_organisations=["acme"], database_url=sql_url
    )
    objects = open_store(settings)
    registry: ModelRegistry | DataSetRegistry
    announced = FileAnnouncement(path="lines.txt", size=7, sha256="a" * 64, part_sha256=["a" * 64])
    if kind == "models":
        registry = ModelRegistry(engine, objects, settings)
        announced = announced.model_copy(update={"path": "model.safetensors"})
        config = FileAnnouncement(path="config.json", size=0, sha256=hashlib.sha256(b"").hexdigest())
        placed = registry.create("tenant-a", ModelCreate(name="placed", path=str(bert_tiny)))
        beside = announced.model_copy(update={"path": "run.py"})
        sent = registry.create("tenant-a", ModelCreate(name="sent", files=[announced, config, beside]))
        unknown, facts, size = UNKNOWN_MODEL, FACTS, sum(file.stat().st_size for file in bert_tiny.iterdir())
        path, prefix = str(bert_tiny), "mdl"
    else:
        registry = DataSetRegistry(engine, objects, settings)
        path, prefix = str(tmp_path / "lines.jsonl"), "dat"
        placed = registry.create("tenant-a", DataSetCreate(name="placed", path=path))
        sent = registry.create("tenant-a", DataSetCreate(name="sent", file=announced))
        unknown, facts, size = UNKNOWN_DATA, {"rows": 4, "labels": 2}, Path(path).stat().st_size
    table = registry.table
    base = {**UNKNOWN, **unknown, "id": identifier(prefix), "tenant_id": "tenant-a", "created_at": rows.now}
    files = Chosen("<files>", lambda value: bool(value) and set(value[0]) == {"path", "size", "sha256"})
    ready = {"name": "placed", "state": "ready", "source": "path", "server_path": path, "size": size}
    rows.check(
        table,
        {**base, **ready, **facts, "progress": 1.0, "digest": DIGEST, "files": files},
        table.c.id == placed.id,
        alike=frozenset({"progress", "rows", "labels"}),
    )

    waiting = {
        **base,
        **({"left_out": ["run.py"]} if kind == "models" else {}),
        "name": "sent",
        "state": "uploading",
        "source": "upload",
        "size": 7,
        "files": files,
    }
    rows.check(table, waiting, table.c.id == sent.id)
    part = {
        "id": identifier("up"),
        "model_id": sent.id if kind == "models" else None,
        "data_set_id": sent.id if kind == "datasets" else None,
        "path": announced.path,
        "size": 7,
        "sha256": "a" * 64,
        "part_size": Chosen("<size of a part>", lambda value: value >= 7),
        "part_sha256": ["a" * 64],
        "store_upload_id": identifier("up"),
        "verified": False,
    }
    rows.check(uploads, part)
    assert registry.sweep_abandoned(-60.0)
    rows.check(table, {**waiting, "state": "failed", "error": MAPPING}, table.c.id == sent.id)
    registry.delete("tenant-a", sent.id)
    registry.sweep_deleted(-60.0)
    gone = {**waiting, "state": "failed", "error": MAPPING, "deleted_at": rows.now, "swept": True}
    rows.check(table, gone, table.c.id == sent.id)

    address = "hf://acme/tiny" if kind == "models" else "hf://datasets/acme/tiny/lines.txt"
    fetched = registry.fetch("tenant-a", "fetched", address, "b" * 40)
    url = registry.get("tenant-a", fetched.id).source_url
    coming = {**base, "name": "fetched", "state": "fetching", "source": "hub", "size": 0}
    coming |= {"source_url": url, "revision": "b" * 40}
    rows.check(table, coming, table.c.id == fetched.id, alike=frozenset({"progress"}))
    intake = Intake(engine, [registry], ttl_s=600)
    claimed = intake._claim_next()
    assert claimed is not None
    _, right = claimed
    right.total, right.done = 4, 1
    intake._renew(registry, right)
    held = {"claim_id": right.claim_id, "claim_until": rows.after(600), "progress": 0.25}
    rows.check(table, {**coming, **held}, table.c.id == fetched.id)
    intake.close()
    if kind == "models":
        adapter = registry.fetch("tenant-a", "adapter", "hf://acme/tuned", base_id=placed.id)
        named = {"name": "adapter", "source_url": adapter.source_url, "revision": None, "base_id": placed.id}
        rows.check(table, {**coming, **named}, table.c.id == adapter.id, alike=frozenset({"progress"}))
    rows.all_seen(table)
