"""F33: a database that is read-only or locked: /readyz reports it, and a submission waits or gets a Retry-After."""

import contextlib
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psycopg
import pytest

from nightpress import migrations
from tests.api_process import ApiProcess
from tests.patience import slowness
from tests.servers import Postgres, Valkey
from tests.service import Service, eventually

LOCK_WAIT_S = 10.0


@pytest.fixture(params=["sqlite", "postgresql"])
def service(
    request: pytest.FixtureRequest, tmp_path: Path, postgres_server: Postgres, valkey_server: Valkey
) -> Iterator[Service]:
    url = postgres_server.create_database() if request.param == "postgresql" else f"sqlite:///{tmp_path / 'np.db'}"
    migrations.upgrade(url)
    service = Service(tmp_path, url, broker_url=valkey_server.url)
    yield service
    service.close()


@pytest.fixture
def api(service: Service, bert_tiny: Path) -> ApiProcess:
    api = ApiProcess(service, bert_tiny)
    api.start()
    return api


@contextmanager
def locked(service: Service) -> Iterator[None]:
    """Hold a lock for which every write of a job waits, as a long VACUUM or ALTER does."""
    if service.engine.dialect.name == "sqlite":
        holder = sqlite3.connect(str(service.engine.url.database), isolation_level=None)
        with contextlib.closing(holder):
            holder.execute("BEGIN IMMEDIATE")
            yield
        return
    with psycopg.connect(service.settings.sql_url.replace("+psycopg", "")) as connection:
        connection.execute("LOCK TABLE jobs, alembic_version IN EXCLUSIVE MODE")
        yield
        connection.rollback()


def database_check(client: httpx.Client) -> tuple[int, str]:
    answer = client.get("/readyz")
    return answer.status_code, answer.json()["checks"]["database"]


def test_f33_readyz_tells_that_a_database_takes_no_writes(service: Service, api: ApiProcess) -> None:
    with api.client() as client:
        assert database_check(client) == (200, "ok")
        with locked(service):
            eventually(lambda: database_check(client) == (503, "can be read, but not written"))
            assert client.get("/v1/jobs").status_code == 200, "what is there can be read"
        eventually(lambda: database_check(client) == (200, "ok"))


def test_f33_a_submission_waits_for_a_lock_that_ends(service: Service, api: ApiProcess) -> None:
    answers: list[httpx.Response] = []

    def submit() -> None:
        with api.client() as client:
            answers.append(client.post("/v1/jobs", json=api.job, timeout=60))

    with locked(service):
        thread = threading.Thread(target=submit)
        thread.start()
        time.sleep(2)
        assert not answers
    thread.join(20 * slowness())
    assert [answer.status_code for answer in answers] == [201]


def test_f33_a_submission_behind_a_lock_that_lasts_hears_when_to_come_again(service: Service, api: ApiProcess) -> None:
    with api.client() as client:
        with locked(service):
            began = time.monotonic()
            refused = client.post("/v1/jobs", json=api.job, timeout=60)
            # The request waits for the lock once, although it also writes the key's first use.
            assert time.monotonic() - began < min((LOCK_WAIT_S + 3) * slowness(), 2 * LOCK_WAIT_S)
        assert (refused.status_code, refused.json()["code"]) == (503, "database_unavailable")
        assert int(refused.headers["retry-after"]) > 0
        assert client.post("/v1/jobs", json=api.job).status_code == 201
        assert len(client.get("/v1/jobs").json()["items"]) == 1


def test_f33_a_standby_is_told_from_a_server_that_is_away(
    tmp_path: Path, postgres_server: Postgres, valkey_server: Valkey, bert_tiny: Path
) -> None:
    """As after a failover, when the old address leads to a read-only server."""
    url = postgres_server.create_database()
    migrations.upgrade(url)
    service = Service(tmp_path, url, broker_url=valkey_server.url)
    name = url.rsplit("/", 1)[1]
    try:
        api = ApiProcess(service, bert_tiny)
        with psycopg.connect(postgres_server.url, autocommit=True) as connection:
            connection.execute(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on'.encode())
        api.start()
        with api.client() as client:
            assert database_check(client) == (503, "can be read, but not written")
            refused = client.post("/v1/jobs", json=api.job)
            assert (refused.status_code, refused.json()["code"]) == (503, "database_unavailable")
            assert int(refused.headers["retry-after"]) > 0
    finally:
        service.close()
