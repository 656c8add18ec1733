"""A real model through the real child: claim, press, verify, ship, commit, in the sandbox."""

import time
from pathlib import Path

import pytest

from core.ids import new_id
from tests.service import Service


@pytest.mark.parametrize("recipe", ["eights", "eighths"])
def test_a_real_model_goes_through_the_confined_child(
    tmp_path: Path, sqlite_url: str, bert_tiny: Path, recipe: str
) -> None:
    service = Service(tmp_path, sqlite_url, lease_ttl_s=20)
    service.model_id, service.model_digest = service.register(new_id("mdl"), bert_tiny)
    quality = {"metric": "fidelity", "samples": 4, "length": 16}
    latency = {"metric": "latency", "length": 16, "repeats": 3}
    passes: dict[str, tuple[list[dict[str, object]], str]] = {
        "eights": ([{"pass": "dynamic-int8"}], "onnx"),
        "eighths": ([{"pass": "weight-only", "bits": 8}], "compressed-tensors"),
    }
    steps, export = passes[recipe]
    job_id = service.submit(
        {"name": recipe, "passes": steps, "exports": [export], "evaluate": [quality, latency]}, run_limit_s=200.0
    )
    slot, _ = service.slot(None, memory=4 * 1024**3)
    started = time.monotonic()
    slot.serve()
    job = service.job(job_id)
    assert job.state == "succeeded", f"{job.error}\n{service.log(job_id)}"
    (artifact,) = service.store.artifacts(job_id)
    assert artifact.format == export
    assert "allows no network namespace" not in service.log(job_id)
    assert time.monotonic() - started < 120
    service.check_invariants(job_id)
    service.close()
