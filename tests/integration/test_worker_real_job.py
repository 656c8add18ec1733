"""A real model through the real child: claim, press, verify, ship, commit, in the sandbox."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from nightpress.core.database import transaction
from nightpress.core.service.registry.models import ModelRegistry
from nightpress.core.service.tables.registry import models
from nightpress.core.wire.models import ModelCreate
from tests.hub_cache import hub_snapshot
from tests.service import TENANT, Service

HALF: dict[str, Any] = {
    "name": "half",
    "passes": [{"pass": "magnitude", "sparsity": 0.5}],
    "exports": ["safetensors"],
    "evaluate": [{"metric": "fidelity", "samples": 4, "length": 16}],
}


def _registered_in_place(service: Service, folder: Path) -> None:
    """Register a folder as a person does, so that the worker gets the recorded path."""
    view = ModelRegistry(service.engine, service.objects, service.settings).create(
        TENANT, ModelCreate(name="cached", path=str(folder))
    )
    assert view.state == "ready"
    with transaction(service.engine, read_only=True) as connection:
        row = connection.execute(select(models.c.id, models.c.digest).where(models.c.id == view.id)).one()
    service.model_id, service.model_digest = row


def _with_an_inner_link(folder: Path, root: Path) -> Path:
    copy = Path(shutil.copytree(folder, root / "tiny"))
    (copy / ".kept").mkdir()
    (copy / "model.safetensors").rename(copy / ".kept" / "weights")
    (copy / "model.safetensors").symlink_to(Path(".kept", "weights"))
    return copy


@pytest.mark.parametrize("lay_out", [_with_an_inner_link, hub_snapshot])
@pytest.mark.slow
def test_a_real_model_in_a_folder_with_links_goes_through_the_confined_child(
    tmp_path: Path, sqlite_url: str, bert_tiny: Path, lay_out: Callable[[Path, Path], Path]
) -> None:
    service = Service(tmp_path, sqlite_url, lease_ttl_s=20, model_roots=[tmp_path / "hub"])
    _registered_in_place(service, lay_out(bert_tiny, tmp_path / "hub"))
    latency = {"metric": "latency", "length": 16, "repeats": 3}
    job_id = service.submit({**HALF, "evaluate": [*HALF["evaluate"], latency]})
    slot, _ = service.slot(None, memory=4 * 1024**3)
    slot.serve()
    job = service.job(job_id)
    assert job.state == "succeeded", f"{job.error}\n{service.log(job_id)}"
    (artifact,) = service.store.reader.artifacts(job_id)
    assert artifact.format == "safetensors"
    report = service.store.reader.report(job_id)
    assert report is not None
    assert report["artifacts"][0]["verification"]["passed"]
    service.check_invariants(job_id)
    service.close()


@pytest.mark.parametrize(
    ("exchanged_for", "code"),
    [("other bytes", "checksum_mismatch"), ("a file outside", "path_not_allowed"), ("nothing", "not_found")],
)
@pytest.mark.slow
def test_a_link_that_was_exchanged_since_is_refused_at_the_first_try(
    tmp_path: Path, sqlite_url: str, bert_tiny: Path, exchanged_for: str, code: str
) -> None:
    snapshot = hub_snapshot(bert_tiny, tmp_path / "hub")
    service = Service(tmp_path, sqlite_url, lease_ttl_s=20, model_roots=[tmp_path / "hub"])
    _registered_in_place(service, snapshot)
    link = snapshot / "model.safetensors"
    weights = link.read_bytes()
    blob = link.resolve()
    if exchanged_for == "other bytes":
        (blob.parent / "other").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
        link.unlink()
        link.symlink_to(Path("..", "..", "blobs", "other"))
    elif exchanged_for == "a file outside":
        # Refused even with the same bytes: the file is outside the allowed folders.
        (tmp_path / "outside").write_bytes(weights)
        link.unlink()
        link.symlink_to(tmp_path / "outside")
    else:
        blob.unlink()
    job_id = service.submit(HALF)
    slot, _ = service.slot(None, memory=4 * 1024**3)
    slot.serve()
    job = service.job(job_id)
    assert job.state == "failed"
    assert job.error is not None
    assert (job.error["code"], job.failures) == (code, 1)
    assert "model.safetensors" in str(job.error["message"]) or blob.parent.name in str(job.error["message"])
    service.check_invariants(job_id)
    service.close()
