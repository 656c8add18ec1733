"""F5, F13, F14: an answer that is lost after the commit; an API that dies before or after it. A repeated request gets the same job."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from nightpress import migrations
from nightpress.core.errors import ErrorCode, NightpressError
from tests.api_process import ApiProcess
from tests.jobs import offer, succeeded
from tests.patience import slowness
from tests.proxy import CuttingProxy
from tests.servers import Postgres, Valkey
from tests.service import TENANT, Service, eventually


@pytest.fixture
def proxy(postgres_server: Postgres) -> Iterator[CuttingProxy]:
    with CuttingProxy(postgres_server.port) as proxy:
        yield proxy


@pytest.fixture
def service(tmp_path: Path, postgres_server: Postgres, valkey_server: Valkey, proxy: CuttingProxy) -> Iterator[Service]:
    """An installation that reaches its database through the proxy."""
    url = postgres_server.create_database()
    migrations.upgrade(url)
    service = Service(
        tmp_path, url.replace(f":{postgres_server.port}/", f":{proxy.port}/"), broker_url=valkey_server.url
    )
    yield service
    service.close()


def lost(proxy: CuttingProxy, ask: Callable[[], object], on: bytes = b"") -> None:
    with proxy.mute(on), pytest.raises(NightpressError) as caught:
        ask()
    assert caught.value.code is ErrorCode.DATABASE_UNAVAILABLE


def test_f5_a_claim_whose_answer_was_lost_is_another_workers_after_the_lease(
    service: Service, proxy: CuttingProxy
) -> None:
    job_id = service.submit()
    lost(proxy, lambda: service.store.claims.claim(offer(), ttl_s=0.3), on=b"UPDATE jobs")
    assert service.job(job_id).state == "running", "it was done"
    assert service.store.claims.claim(offer(), ttl_s=60) is None
    eventually(lambda: service.store.expiry.expire_leases(backoff_s=0.0))
    claimed = eventually(lambda: service.store.claims.claim(offer(), ttl_s=60))
    assert (claimed.job.id, claimed.job.attempt, claimed.job.failures) == (job_id, 2, 1)


def test_f5_a_result_whose_commit_was_not_heard_of_is_there_once(service: Service, proxy: CuttingProxy) -> None:
    job_id = service.submit()
    claimed = service.store.claims.claim(offer(), ttl_s=60)
    assert claimed is not None
    lost(proxy, lambda: service.store.attempts.finish(claimed.lease, succeeded(claimed.lease)), on=b"COMMIT\0")
    assert service.job(job_id).state == "succeeded", "it was done"
    assert service.store.attempts.finish(claimed.lease, succeeded(claimed.lease)) is False
    assert service.kinds(job_id).count("succeeded") == 1
    assert len(service.store.reader.artifacts(job_id)) == 1


@pytest.fixture
def api(service: Service, bert_tiny: Path) -> ApiProcess:
    return ApiProcess(service, bert_tiny)


def test_f5_a_submission_whose_answer_was_lost_is_one_job(api: ApiProcess, proxy: CuttingProxy) -> None:
    api.start()
    with api.client() as client:
        assert client.get("/v1/jobs").status_code == 200
        with proxy.mute():
            response = client.post("/v1/jobs", json=api.job)
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) > 0
        again = eventually(lambda: _taken(client.post("/v1/jobs", json=api.job)))
        assert [item["id"] for item in client.get("/v1/jobs").json()["items"]] == [again.json()["id"]]


def _taken(response: httpx.Response) -> httpx.Response | None:
    return response if response.status_code in {200, 201} else None


@pytest.mark.parametrize(("moment", "written"), [("before", 0), ("after", 1)])
def test_f14_an_api_that_dies_around_the_commit_leaves_one_job_to_who_asks_again(
    service: Service, api: ApiProcess, moment: str, written: int
) -> None:
    api.start(dies=moment)
    with api.client() as client, pytest.raises(httpx.TransportError):
        client.post("/v1/jobs", json=api.job)
    assert api.process is not None
    assert api.process.wait(10 * slowness()) == -signal.SIGKILL
    assert len(service.store.reader.page(TENANT)[0]) == written
    api.start()
    with api.client() as client:
        again = client.post("/v1/jobs", json=api.job)
        assert again.status_code == (200 if written else 201)
        assert [item["id"] for item in client.get("/v1/jobs").json()["items"]] == [again.json()["id"]]


def test_f13_a_job_whose_api_died_before_it_could_ring_runs_within_a_tick(service: Service, api: ApiProcess) -> None:
    service.start_worker("press")
    service.start_control()
    eventually(lambda: "ticks every" in service.output() and "serves cpu" in service.output(), within=60)
    api.start(dies="after")
    with api.client() as client, pytest.raises(httpx.TransportError):
        client.post("/v1/jobs", json=api.job)
    [job] = service.store.reader.page(TENANT)[0]
    service.await_state(job.id, "running", "succeeded", within=service.settings.tick_s + 3.0)
    service.await_state(job.id, "succeeded")
    service.check_invariants(job.id)
