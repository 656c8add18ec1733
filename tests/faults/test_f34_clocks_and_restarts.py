"""F34 to F39: clocks that differ, servers that restart between two steps, cancellation in every phase, an API killed in mid-upload."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import event

from nightpress import migrations
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.service.jobs.store import JobStore
from tests.face import Face
from tests.faults.test_f06_storage import register_large_model
from tests.jobs import add_model, claim, offer, submit, succeeded
from tests.patience import slowness
from tests.proxy import FaultyHttp
from tests.servers import S3, Postgres
from tests.service import MIB, Service, eventually

CLOCKS = ("3600", "-3600")


def test_f34_control_processes_whose_clocks_differ_take_no_living_job_and_free_a_dead_workers(service: Service) -> None:
    for clock in CLOCKS:
        service.start_control(clock)
    eventually(lambda: service.output().count("ticks every") == len(CLOCKS), within=60)
    first = service.start_worker("slow")
    living = service.submit_and_ring(queue_limit_s=600.0)
    job = service.await_state(living, "succeeded", "failed", within=30)
    assert (job.state, job.attempt, job.failures) == ("succeeded", 1, 0), job.error
    first.terminate()
    assert first.wait(20 * slowness()) == 0
    worker = service.start_worker("first_slow")
    dead = service.submit_and_ring()
    service.await_state(dead, "running")
    worker.kill()
    eventually(lambda: service.job(dead).failures == 1, within=service.settings.lease_ttl_s + 5)
    service.start_worker("press")
    assert service.await_state(dead, "succeeded", within=30).attempt == 2
    for job_id in (living, dead):
        service.check_invariants(job_id)


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[Postgres]:
    with Postgres(tmp_path / "postgres", durable=True) as server:
        yield server


@pytest.mark.parametrize(
    ("step", "moment"),
    [
        ("claim", "before_cursor_execute"),  # a single statement, which commits by itself
        ("renew", "before_cursor_execute"),
        ("finish", "before_cursor_execute"),
        ("finish", "commit"),
    ],
)
def test_f35_a_database_that_restarts_before_a_commit_has_written_none_of_it(
    postgres: Postgres, step: str, moment: str
) -> None:
    """The same call, repeated, writes everything once."""
    store, job_id = store_on(postgres)
    lease = None if step == "claim" else claim(store, ttl_s=600.0).lease

    def call() -> object:
        if step == "claim":
            return store.claims.claim(offer(), ttl_s=600.0)
        assert lease is not None
        return (
            store.attempts.renew(lease, ttl_s=600.0)
            if step == "renew"
            else store.attempts.finish(lease, succeeded(lease))
        )

    before = store.reader.get("default", job_id)
    restarted = []

    def restart(*_: object) -> None:
        if not restarted:
            restarted.append(True)
            postgres.kill()
            postgres.start()

    event.listen(store.engine, moment, restart)
    with pytest.raises(NightpressError) as raised:
        call()
    assert raised.value.code is ErrorCode.DATABASE_UNAVAILABLE
    assert restarted
    assert store.reader.get("default", job_id) == before
    assert call()
    job = store.reader.get("default", job_id)
    assert job is not None
    assert (job.state, job.attempt) == ("succeeded" if step == "finish" else "running", 1)
    events = store.reader.events(job_id)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert len(store.reader.artifacts(job_id)) == (step == "finish")
    store.engine.dispose()


def test_f35_a_database_that_restarts_between_claim_and_result_costs_no_attempt(postgres: Postgres) -> None:
    store, job_id = store_on(postgres)
    lease = claim(store, ttl_s=600.0).lease
    postgres.kill()
    postgres.start()

    def finished() -> bool:
        try:
            return store.attempts.finish(lease, succeeded(lease))
        except NightpressError:
            return False  # this process's connection is broken too

    eventually(finished)
    job = store.reader.get("default", job_id)
    assert job is not None
    assert (job.state, job.attempt, job.failures) == ("succeeded", 1, 0)
    store.engine.dispose()


def store_on(server: Postgres) -> tuple[JobStore, str]:
    from nightpress.core.database import make_engine

    url = server.create_database()
    migrations.upgrade(url)
    engine = make_engine(url)
    add_model(engine)
    store = JobStore(engine)
    return store, submit(store)


def test_f36_an_object_store_that_restarts_between_two_parts_loses_no_byte(tmp_path: Path, sqlite_url: str) -> None:
    with S3(tmp_path / "s3") as server, FaultyHttp(server.port) as proxy:
        bucket = server.create_bucket()
        service = Service(
            tmp_path,
            sqlite_url,
            storage_url=f"s3://{bucket}",
            s3_endpoint_url=proxy.url,
            s3_access_key_id=server.access_key,
            s3_secret_access_key=server.secret_key,
            lease_ttl_s=60.0,
        )
        try:
            register_large_model(service, tmp_path)
            job_id = service.submit(max_failures=2)
            lock, restarts = threading.Lock(), []

            def fault(method: str, path: str) -> None:
                with lock:
                    if method == "PUT" and "partNumber=2" in path and not restarts:
                        restarts.append(path)
                        server.kill()
                        server.start()

            proxy.fault = fault
            slot, supervisor = service.slot("press")
            eventually(lambda: slot.serve() or service.job(job_id).finished_at, within=120)
            supervisor.close()
            assert restarts
            job = service.job(job_id)
            assert job.state == "succeeded", job.error
            service.check_invariants(job_id)
            assert not server.client().list_multipart_uploads(Bucket=bucket).get("Uploads")
        finally:
            service.close()


@pytest.mark.parametrize("phase", ["validating", "baseline", "pressing", "exporting", "verifying", "evaluating"])
def test_f38_a_cancellation_in_every_phase_is_one_clean_end(service: Service, phase: str) -> None:
    """The phases of fetching and uploading are in test_f06_storage.py."""
    job_id = service.submit()
    slot, supervisor = service.slot(f"staying:{phase}")
    thread = threading.Thread(target=slot.serve)
    thread.start()
    eventually(lambda: service.job(job_id).phase == phase)
    told = time.monotonic()
    for _ in range(2):
        service.store.requests.request_cancel("default", job_id)
    thread.join(15 * slowness())
    assert not thread.is_alive()
    assert time.monotonic() - told < 5 * slowness()
    supervisor.close()
    assert service.job(job_id).state == "cancelled"
    service.check_invariants(job_id)


class KillingMeter:
    """An upload's meter that calls `act` once, when `after` bytes have been sent."""

    def __init__(self, after: int, act: Callable[[], None]) -> None:
        self._left, self._act, self._lock, self._done = after, act, threading.Lock(), False

    def expect(self, size: int) -> None: ...

    def advance(self, size: int) -> None:
        with self._lock:
            self._left -= size
            if self._left <= 0 and not self._done:
                self._done = True
                self._act()


def test_f39_an_api_that_is_killed_in_mid_upload_takes_the_rest_when_it_is_back(tmp_path: Path) -> None:
    face = Face(tmp_path)
    face.start()
    back = threading.Timer(1.0, face.start)

    def kill() -> None:
        face.stop()
        back.start()

    texts = tmp_path / "texts.txt"
    line = "a line of forty characters, every time.\n"
    texts.write_text(line * (20 * MIB // len(line)))
    try:
        with face.client(retries=40) as client:
            data = client.data_sets.upload(texts, "texts", meter=KillingMeter(10 * MIB, kill))
            back.join(60 * slowness())
            assert client.data_sets.wait(data.id).state == "ready"
        assert back.finished.is_set()
        left = [
            path for path in face.settings.data_dir.rglob("*") if ".partial" in path.name or "uploads" in path.parts
        ]
        assert not [path for path in left if path.is_file()]
    finally:
        back.cancel()
        face.close()
