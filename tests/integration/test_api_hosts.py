"""What the API says about hosts with several GPUs: workers, queues, jobs, usage and metrics."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from nightpress.core.settings import Settings
from nightpress.worker.offer import introduce
from tests.api import RunningApi, serve
from tests.jobs import GB, host

RECIPE = {"name": "on-gpus", "passes": [{"pass": "magnitude"}], "exports": ["safetensors"], "device": "gpu"}


@pytest.fixture
def api(sqlite_url: str, tmp_path: Path, bert_tiny: Path) -> Iterator[RunningApi]:
    broker = "redis://127.0.0.1:1/0"  # there is none: a failed ring must not matter
    settings = Settings(data_dir=tmp_path, database_url=sqlite_url, broker_url=broker, model_roots=[bert_tiny.parent])
    with serve(settings) as running:
        yield running


@pytest.fixture
def client(api: RunningApi, bert_tiny: Path) -> Iterator[httpx.Client]:
    with api.client() as client:
        assert client.post("/v1/models", json={"name": "tiny", "path": str(bert_tiny)}).status_code == 201
        yield client


def submit(client: httpx.Client, gpus: int) -> str:
    response = client.post("/v1/jobs", json={"model": "tiny", "recipe": {**RECIPE, "gpus": gpus}})
    assert response.status_code == 201, response.text
    return str(response.json()["id"])


@pytest.mark.slow
def test_gpus_are_listed_with_their_jobs_and_counted(api: RunningApi, client: httpx.Client):
    store = api.services.resources.store
    offer = host("a-host", 3, memory=1 << 40, cpu_jobs=2)
    store.roster.heartbeat_worker(introduce(offer, draining=False))
    job_ids = [submit(client, count) for count in (2, 3)]
    assert store.claims.claim(offer, ttl_s=600) is not None
    seen = next(worker for worker in client.get("/v1/workers").json()["items"] if worker["id"] == "a-host")
    assert (seen["state"], seen["cpu_jobs"], seen["job_ids"]) == ("busy", 2, job_ids[:1])
    assert [(gpu["uuid"], gpu["memory"], gpu["held"], gpu["job_id"]) for gpu in seen["gpus"]] == [
        ("GPU-HBM3-0", 80 * GB, True, job_ids[0]),
        ("GPU-HBM3-1", 80 * GB, True, job_ids[0]),
        ("GPU-HBM3-2", 80 * GB, False, None),
    ]
    with api.client(tenant_id="other") as stranger:
        seen = next(worker for worker in stranger.get("/v1/workers").json()["items"] if worker["id"] == "a-host")
        assert (seen["job_ids"], [gpu["held"] for gpu in seen["gpus"]]) == ([], [True, True, False])
        assert {gpu["job_id"] for gpu in seen["gpus"]} == {None}, "another tenant's job has no id"
    queue = next(queue for queue in client.get("/v1/queues").json()["items"] if queue["name"] == "gpu")
    assert (queue["queued_gpus"], queue["running_gpus"]) == (3, 2)
    assert [client.get(f"/v1/jobs/{job_id}").json()["gpus"] for job_id in job_ids] == [2, 3]
    assert client.get("/v1/me").json()["usage"]["running_gpus"] == 2
    text = client.get("/metrics").text
    for line in (
        'nightpress_gpus{state="queued"} 3.0',
        'nightpress_gpus{state="running"} 2.0',
        'nightpress_worker_gpus{state="busy"} 2.0',
        'nightpress_worker_gpus{state="free"} 1.0',
    ):
        assert line in text
    store.roster.remove_worker("a-host")
