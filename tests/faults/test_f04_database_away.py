"""F4: a database that is locked, or whose server is down, for less and for longer than a lease."""

import contextlib
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from nightpress import migrations
from nightpress.core.database import make_engine
from nightpress.core.errors import NightpressError
from nightpress.core.service.jobs.store import JobStore
from nightpress.worker.lease import LeaseKeeper
from tests.api_process import ApiProcess
from tests.jobs import add_model, claim, submit
from tests.servers import Postgres, Valkey
from tests.service import Service, eventually, pids_said, running


@contextmanager
def locked(service: Service) -> Iterator[None]:
    """Lock the database: it refuses every write inside this context."""
    connection = sqlite3.connect(str(service.engine.url.database), isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    try:
        yield
    finally:
        connection.execute("ROLLBACK")
        connection.close()


def test_f4_a_database_that_is_away_for_less_than_the_lease_costs_nothing(service: Service) -> None:
    service.start_worker("slow")
    service.start_control()
    job_id = service.submit()
    service.await_state(job_id, "running")
    with locked(service):
        time.sleep(service.settings.lease_ttl_s / 2)
    job = service.await_state(job_id, "succeeded")
    assert (job.attempt, job.failures) == (1, 0)
    service.check_invariants(job_id)


def test_f4_a_worker_that_cannot_renew_in_time_stops_its_child_and_commits_nothing(service: Service) -> None:
    service.start_worker("first_slow")
    job_id = service.submit_and_ring()
    said = pids_said(service.await_log(job_id, "consumer"))
    with locked(service):
        eventually(lambda: not running(said), within=service.settings.lease_ttl_s + 2)
        time.sleep(0.5)
    time.sleep(0.3)
    assert service.job(job_id).state == "running", "only the control process may take the job from it"
    service.start_control()
    job = service.await_state(job_id, "succeeded", within=15)
    assert job.attempt == 2
    service.check_invariants(job_id)


def test_f4_a_server_that_is_gone_for_a_while_costs_503s_and_no_attempt(
    tmp_path: Path, valkey_server: Valkey, bert_tiny: Path
) -> None:
    """Meanwhile the supervisor keeps the child's messages."""
    with Postgres(tmp_path / "postgres", durable=True) as server:
        url = server.create_database()
        migrations.upgrade(url)
        service = Service(tmp_path, url, broker_url=valkey_server.url, lease_ttl_s=10.0)
        try:
            api = ApiProcess(service, bert_tiny)
            api.start()
            service.start_control()
            service.start_worker("slow")
            job_id = service.submit_and_ring()
            service.await_log(job_id, "step 3")
            server.kill()
            with api.client() as client:
                refused = client.post("/v1/jobs", json=api.job)
                assert (refused.status_code, refused.json()["code"]) == (503, "database_unavailable")
                assert refused.headers["content-type"] == "application/problem+json"
                assert int(refused.headers["retry-after"]) > 0
                time.sleep(1.5)
                server.start()
                assert eventually(lambda: _accepted(client.post("/v1/jobs", json=api.job)))
            with contextlib.suppress(NightpressError):  # this process's connection is broken too
                service.job(job_id)
            job = service.await_state(job_id, "succeeded")
            assert (job.attempt, job.failures) == (1, 0)
            said = [line for line in service.log(job_id).splitlines() if line.startswith("step ")]
            assert said == [f"step {number}" for number in range(40)]
            service.check_invariants(job_id)
        finally:
            service.close()


def test_f4_the_last_words_are_written_once_the_server_is_back(tmp_path: Path) -> None:
    with Postgres(tmp_path / "postgres", durable=True) as server:
        url = server.create_database()
        migrations.upgrade(url)
        engine = make_engine(url)
        store = JobStore(engine)
        add_model(engine)
        job_id = submit(store)
        lease = claim(store, ttl_s=20.0).lease
        keeper = LeaseKeeper(store, lease, ttl_s=20.0, claimed_at=time.monotonic(), on_renewed=lambda: None)
        keeper.log_line("info", "the last words")
        server.kill()
        threading.Timer(0.5, server.start).start()
        keeper.close()
        assert [line.text for line in store.reader.logs(job_id)] == ["the last words"]
        engine.dispose()


def _accepted(response: httpx.Response) -> bool:
    return response.status_code in {200, 201}
