"""F3, F9: rings that are lost, doubled or forged. Jobs are claimed in SQL, so at worst they start a little later."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from nightpress.core.service.jobs.ring import Ringer, make_celery
from tests.api_process import ApiProcess
from tests.patience import slowness
from tests.servers import Valkey
from tests.service import Service, eventually


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Valkey]:
    with Valkey(tmp_path / "broker") as server:
        yield server


@pytest.fixture
def own(tmp_path: Path, sqlite_url: str, broker: Valkey) -> Iterator[Service]:
    """An installation with its own broker, which the test may break."""
    service = Service(tmp_path, sqlite_url, broker_url=broker.url)
    yield service
    service.close()


def test_f3_ringing_a_dead_broker_neither_blocks_nor_raises(own: Service, broker: Valkey) -> None:
    broker.kill()
    ringer = Ringer(own.settings)
    started = time.monotonic()
    for _ in range(200):
        ringer.ring("cpu")
    assert time.monotonic() - started < 0.1 * slowness()
    ringer.close()
    assert time.monotonic() - started < 3 * slowness()


def test_f3_ringing_a_hung_broker_neither_blocks_nor_raises(own: Service, broker: Valkey) -> None:
    broker.freeze()
    ringer = Ringer(own.settings)
    started = time.monotonic()
    ringer.ring("cpu")
    ringer.close()
    assert time.monotonic() - started < 3 * slowness()
    broker.thaw()


def test_f3_a_job_submitted_while_the_broker_is_down_runs_and_the_running_one_is_unaffected(
    own: Service, broker: Valkey
) -> None:
    own.start_control()
    own.start_worker("slow")
    first = own.submit()
    own.await_state(first, "running")
    broker.kill()
    second = own.submit()
    own.await_state(first, "succeeded", within=15)
    own.await_state(second, "succeeded", within=20)
    broker.start()
    third = own.submit()
    job = own.await_state(third, "running", "succeeded", within=10)
    assert job.attempt == 1
    for job_id in (first, second):
        own.check_invariants(job_id)
        assert own.job(job_id).attempt == 1


def test_f3_an_api_takes_jobs_as_fast_and_says_that_it_is_degraded(
    own: Service, broker: Valkey, bert_tiny: Path
) -> None:
    api = ApiProcess(own, bert_tiny)
    api.start()
    with api.client() as client:
        assert client.get("/readyz").json()["status"] == "ok"
        for away in (broker.kill, broker.start, broker.freeze):
            away()
            asked = time.monotonic()
            answer = client.post("/v1/jobs", json=api.job, headers={"Idempotency-Key": away.__name__})
            assert answer.status_code == 201
            assert time.monotonic() - asked < 0.5 * slowness()
            status = "ok" if away == broker.start else "degraded"
            eventually(lambda status=status: client.get("/readyz").json()["status"] == status)
    broker.thaw()


def test_f3_rings_that_a_flush_destroyed_are_rung_again(own: Service, broker: Valkey) -> None:
    own.start_worker("press")
    own.start_control()
    jobs = []
    for _ in range(4):
        broker.flush()
        jobs.append(own.submit())
        broker.flush()
    for job_id in jobs:
        own.await_state(job_id, "succeeded")


def test_f9_a_ring_delivered_many_times_starts_one_attempt(own: Service) -> None:
    app = make_celery(own.settings)
    own.start_worker("press")
    job_id = own.submit()
    for queue in ("cpu", "cpu", "gpu", "cpu", "nonsense"):
        app.send_task("nightpress.ring", args=[queue], queue="cpu")
    own.await_state(job_id, "succeeded")
    eventually(lambda: not redis.Redis.from_url(own.settings.celery_url).llen("cpu"))
    assert own.kinds(job_id).count("started") == 1
    app.close()
    own.check_invariants(job_id)


def test_the_control_process_rings_sparingly(own: Service, broker: Valkey) -> None:
    """Ten jobs and one worker: after each job the worker looks for the next one, so it needs no ring."""
    with redis.Redis.from_url(broker.url) as client:
        own.start_worker("press")
        own.start_control()
        jobs = [own.submit() for _ in range(10)]
        before = client.info("commandstats").get("cmdstat_lpush", {"calls": 0})["calls"]
        own.await_state(jobs[-1], "succeeded", within=60)
        rings = client.info("commandstats").get("cmdstat_lpush", {"calls": 0})["calls"] - before
    assert rings <= 8
