"""F5, F14: an answer that is lost after the commit, an API that dies before or after it. Whoever asks again gets the same job."""

import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from sqlalchemy import update

import migrations
from core.access.keys import create_key
from core.database import transaction
from core.errors import ErrorCode, NightpressError
from core.ids import new_id
from core.recipes.inspect import FolderFiles, inspect_model
from core.registry.tables import models
from tests.jobs import offer, succeeded
from tests.proxy import CuttingProxy
from tests.servers import Postgres, free_port
from tests.service import TENANT, Service, eventually

JOB = {"model": "m", "recipe": "int8-encoder"}


@pytest.fixture
def proxy(postgres_server: Postgres) -> Iterator[CuttingProxy]:
    with CuttingProxy(postgres_server.port) as proxy:
        yield proxy


@pytest.fixture
def service(tmp_path: Path, postgres_server: Postgres, proxy: CuttingProxy) -> Iterator[Service]:
    """An installation whose every statement goes through the proxy."""
    url = postgres_server.create_database()
    migrations.upgrade(url)
    service = Service(tmp_path, url.replace(f":{postgres_server.port}/", f":{proxy.port}/"))
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
    lost(proxy, lambda: service.store.claim(offer(), ttl_s=0.3), on=b"UPDATE jobs")
    assert service.job(job_id).state == "running", "it was done"
    assert service.store.claim(offer(), ttl_s=60) is None
    eventually(lambda: service.store.expire_leases(backoff_s=0.0))
    claimed = eventually(lambda: service.store.claim(offer(), ttl_s=60))
    assert (claimed.job.id, claimed.job.attempt, claimed.job.failures) == (job_id, 2, 1)


def test_f5_a_result_whose_commit_was_not_heard_of_is_there_once(service: Service, proxy: CuttingProxy) -> None:
    job_id = service.submit()
    claimed = service.store.claim(offer(), ttl_s=60)
    assert claimed is not None
    lost(proxy, lambda: service.store.finish(claimed.lease, succeeded(claimed.lease)), on=b"COMMIT\0")
    assert service.job(job_id).state == "succeeded", "it was done"
    assert service.store.finish(claimed.lease, succeeded(claimed.lease)) is False
    assert service.kinds(job_id).count("succeeded") == 1
    assert len(service.store.artifacts(job_id)) == 1


class Api:
    """`python -m api`, the real process, that may be told to die around a submission's commit."""

    def __init__(self, service: Service, model: Path) -> None:
        self.service = service
        self.port = free_port()
        self.key = create_key(
            service.engine,
            tenant_id=TENANT,
            name="t",
            scopes=["jobs:read", "jobs:write", "models:read", "models:write"],
        )[1]
        service.model_id, service.model_digest = service.register(new_id("mdl"), model)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, dies: str = "") -> None:
        script = ("-P", "tests/api_process.py", dies) if dies else ("-m", "api")
        self.process = self.service.start(*script, NIGHTPRESS_API_PORT=str(self.port))
        with self.client() as client:
            eventually(lambda: self._answers(client), within=60)

    @staticmethod
    def _answers(client: httpx.Client) -> bool:
        try:
            return client.get("/healthz").status_code == 200
        except httpx.TransportError:
            return False

    def client(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.key}", "Idempotency-Key": "k"}
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", headers=headers, timeout=20, trust_env=False)


@pytest.fixture
def api(service: Service, bert_tiny: Path) -> Api:
    return Api(service, bert_tiny)


def prepare(service: Service, bert_tiny: Path) -> None:
    """The model's header, which a plan is made from."""
    header = inspect_model(FolderFiles(bert_tiny))
    with transaction(service.engine) as connection:
        connection.execute(
            update(models).where(models.c.id == service.model_id).values(header=header.model_dump(mode="json"))
        )


def test_f5_a_submission_whose_answer_was_lost_is_one_job(
    service: Service, api: Api, proxy: CuttingProxy, bert_tiny: Path
) -> None:
    prepare(service, bert_tiny)
    api.start()
    body = JOB | {"model": service.model_id}
    with api.client() as client:
        assert client.get("/v1/jobs").status_code == 200
        with proxy.mute():
            response = client.post("/v1/jobs", json=body)
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) > 0
        again = eventually(lambda: _taken(client.post("/v1/jobs", json=body)))
        assert [one["id"] for one in client.get("/v1/jobs").json()["items"]] == [again.json()["id"]]


def _taken(response: httpx.Response) -> httpx.Response | None:
    return response if response.status_code in {200, 201} else None


@pytest.mark.parametrize(("moment", "written"), [("before", 0), ("after", 1)])
def test_f14_an_api_that_dies_around_the_commit_leaves_one_job_to_who_asks_again(
    service: Service, api: Api, bert_tiny: Path, moment: str, written: int
) -> None:
    prepare(service, bert_tiny)
    api.start(dies=moment)
    body = JOB | {"model": service.model_id}
    with api.client() as client, pytest.raises(httpx.TransportError):
        client.post("/v1/jobs", json=body)
    assert api.process is not None
    assert api.process.wait(10) == -signal.SIGKILL
    assert len(service.store.page(TENANT)[0]) == written
    api.start()
    with api.client() as client:
        again = client.post("/v1/jobs", json=body)
        assert again.status_code == (200 if written else 201)
        assert [one["id"] for one in client.get("/v1/jobs").json()["items"]] == [again.json()["id"]]
