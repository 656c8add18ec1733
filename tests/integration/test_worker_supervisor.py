"""One claimed job through a real child process: its result committed, or its failure told."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service import Service


@pytest.fixture
def service(tmp_path: Path, sqlite_url: str) -> Iterator[Service]:
    service = Service(tmp_path, sqlite_url)
    yield service
    service.close()


def test_a_job_runs_from_claim_to_committed_artifacts(service: Service):
    job_id = service.submit()
    slot, _ = service.slot("press")
    slot.serve()
    job = service.job(job_id)
    assert (job.state, job.verdict, job.attempt, job.failures) == ("succeeded", "accepted", 1, 0), service.log(job_id)
    (artifact,) = service.store.artifacts(job_id)
    assert [file["path"] for file in artifact.files] == ["config.json", "model.safetensors"]
    assert service.store.report(job_id)["job_id"] == job_id
    assert service.objects.stat(f"jobs/{job_id}/attempts/1/manifest.json") is not None
    service.check_invariants(job_id)
