"""A real model through the real child: claim, press, verify, ship, commit, in the sandbox."""

from pathlib import Path

from core.ids import new_id
from tests.service import Service


def test_a_real_model_goes_through_the_confined_child(tmp_path: Path, sqlite_url: str, bert_tiny: Path) -> None:
    service = Service(tmp_path, sqlite_url, lease_ttl_s=20)
    service.model_id, service.model_digest = service.register(new_id("mdl"), bert_tiny)
    recipe = {
        "name": "half",
        "passes": [{"pass": "magnitude", "sparsity": 0.5}],
        "exports": ["safetensors"],
        "evaluate": [
            {"metric": "fidelity", "samples": 4, "length": 16},
            {"metric": "latency", "length": 16, "repeats": 3},
        ],
    }
    job_id = service.submit(recipe, run_limit_s=200.0)
    slot, _ = service.slot(None, memory=4 * 1024**3)
    slot.serve()
    job = service.job(job_id)
    assert job.state == "succeeded", f"{job.error}\n{service.log(job_id)}"
    (artifact,) = service.store.artifacts(job_id)
    assert artifact.format == "safetensors"
    report = service.store.report(job_id)
    assert report is not None
    assert report["artifacts"][0]["verification"]["passed"]
    service.check_invariants(job_id)
    service.close()
