"""F6, F7, and F11, F20, F21 with a faulty object store, in downloads and in uploads.

The store refuses requests, is slow, hangs, rejects our credentials or alters bytes.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import update

from nightpress.core.database import db_now, transaction
from nightpress.core.ids import new_id
from nightpress.core.service.jobs.records import Job
from nightpress.core.service.tables.jobs import job_attempts
from tests.jobs import offer
from tests.patience import slowness
from tests.proxy import Fault, FaultyHttp
from tests.servers import S3
from tests.service import Service, eventually


@pytest.fixture
def proxy(s3_server: S3) -> Iterator[FaultyHttp]:
    with FaultyHttp(s3_server.port) as proxy:
        yield proxy


@pytest.fixture
def service(tmp_path: Path, sqlite_url: str, s3_server: S3, proxy: FaultyHttp) -> Iterator[Service]:
    service = Service(
        tmp_path,
        sqlite_url,
        storage_url=f"s3://{s3_server.create_bucket()}",
        s3_endpoint_url=proxy.url,
        s3_access_key_id=s3_server.access_key,
        s3_secret_access_key=s3_server.secret_key,
        lease_ttl_s=20.0,
    )
    yield service
    service.close()


def on(method: str, part: str, what: int | float | str, times: int = 10**9) -> Fault:
    """A fault for the first `times` requests with this method whose path contains `part`."""
    left = [times]

    def fault(asked: str, path: str) -> int | float | str | None:
        if asked != method or part not in path or left[0] == 0:
            return None
        left[0] -= 1
        return what

    return fault


def register_large_model(service: Service, tmp_path: Path) -> None:
    """Register a model whose file is uploaded and downloaded in two parts."""
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(os.urandom(17 * 1024**2))
    service.model_id, service.model_digest = service.register(new_id("mdl"), folder)


def run_to_its_end(service: Service) -> Job:
    job_id = service.submit(max_failures=2)
    slot, supervisor = service.slot("press")
    eventually(lambda: slot.serve() or service.job(job_id).finished_at, within=60)
    supervisor.close()
    service.check_invariants(job_id)
    return service.job(job_id)


def test_f6_a_store_that_refuses_for_a_moment_costs_no_attempt(service: Service, proxy: FaultyHttp) -> None:
    proxy.fault = on("PUT", "/jobs/", 503, times=2)
    job = run_to_its_end(service)
    assert (job.state, job.attempt) == ("succeeded", 1)


@pytest.mark.parametrize("status", [500, 403])
def test_f6_a_store_that_takes_nothing_fails_the_job_after_its_attempts(
    service: Service, proxy: FaultyHttp, status: int
) -> None:
    proxy.fault = on("PUT", "/jobs/", status)
    job = run_to_its_end(service)
    assert job.error is not None
    assert (job.state, job.attempt, job.error["code"]) == ("failed", 2, "storage_unavailable")
    puts = [item for item in proxy.seen if item[0] == "PUT" and "/jobs/" in item[1]]
    assert len(puts) <= 2 * 2 * 4, "tries are bounded"


def test_f6_bytes_that_were_altered_on_their_way_up_are_not_taken(service: Service, proxy: FaultyHttp) -> None:
    proxy.fault = on("PUT", "/jobs/", "alter")
    job = run_to_its_end(service)
    assert job.error is not None
    assert (job.state, job.error["code"]) == ("failed", "checksum_mismatch")


def test_f6_a_large_upload_that_breaks_off_leaves_no_parts(
    service: Service, proxy: FaultyHttp, s3_server: S3, tmp_path: Path
) -> None:
    register_large_model(service, tmp_path)
    proxy.fault = on("PUT", "partNumber=2", 500)
    job = run_to_its_end(service)
    assert job.error is not None
    assert (job.state, job.error["code"]) == ("failed", "storage_unavailable")
    bucket = service.settings.storage_url.removeprefix("s3://")
    assert not s3_server.client().list_multipart_uploads(Bucket=bucket).get("Uploads")


def test_f6_a_store_that_is_slower_than_a_lease_costs_no_attempt(service: Service, proxy: FaultyHttp) -> None:
    ttl_s = slowness()
    service.settings = service.settings.model_copy(update={"lease_ttl_s": ttl_s})
    proxy.fault = on("PUT", "/jobs/", 1.5 * ttl_s)
    job = run_to_its_end(service)
    assert (job.state, job.attempt) == ("succeeded", 1)


@pytest.mark.parametrize(("method", "part", "phase"), [("GET", "/models/", "fetching"), ("PUT", "/jobs/", "uploading")])
def test_f6_f20_f21_a_store_that_hangs_holds_up_neither_a_cancellation_nor_a_deploy(
    service: Service, proxy: FaultyHttp, tmp_path: Path, method: str, part: str, phase: str
) -> None:
    """The worker waits for an answer that doesn't come, in a download or in an upload of several parts."""
    register_large_model(service, tmp_path)
    proxy.fault = on(method, part, "hang")
    worker = service.start_worker("press")

    def hang() -> str:
        job_id = service.submit()
        eventually(lambda: service.job(job_id).phase == phase)
        eventually(lambda: any(item[0] == method and part in item[1] for item in proxy.seen))
        return job_id

    cancelled = hang()
    service.store.requests.request_cancel("default", cancelled)
    service.await_state(cancelled, "cancelled", within=5)
    given_back = hang()
    worker.terminate()
    assert worker.wait(10 * slowness()) == 0
    job = service.job(given_back)
    assert (job.state, job.attempt, job.failures) == ("queued", 1, 0), "a deploy is no failure"
    proxy.fault = lambda _method, _path: None
    slot, supervisor = service.slot("press")
    slot.serve()
    supervisor.close()
    assert service.job(given_back).state == "succeeded"
    for job_id in (cancelled, given_back):
        service.check_invariants(job_id)


def test_f6_a_store_that_hangs_holds_up_no_lease(service: Service, proxy: FaultyHttp) -> None:
    """The control process starts by sweeping files, and waits for an answer that doesn't come."""
    job_id = service.submit(max_failures=1)
    proxy.fault = lambda _method, _path: "hang"
    control = service.start_control()
    eventually(lambda: proxy.seen, within=30)
    assert service.store.claims.claim(offer(), ttl_s=1.0) is not None
    service.await_state(job_id, "failed", within=5)
    assert control.poll() is None
    control.kill()


def test_f11_a_zombie_that_was_frozen_while_it_uploaded_wins_nothing_and_its_files_go(
    service: Service, proxy: FaultyHttp
) -> None:
    service.settings = service.settings.model_copy(update={"lease_ttl_s": 2.0 * slowness()})
    last = "/attempts/1/manifest.json"
    proxy.fault = on("PUT", last, "hang")
    service.start_control()
    zombie = service.start_worker("press")
    job_id = service.submit()
    eventually(lambda: any(last in path for _, path in proxy.seen))
    zombie.send_signal(signal.SIGSTOP)
    service.start_worker("press")
    job = service.await_state(job_id, "succeeded", within=15)
    assert (job.attempt, job.failures) == (2, 1)
    events = service.events(job_id)
    proxy.let_go.set()  # now the store completes the zombie's upload
    eventually(lambda: service.objects.stat(f"jobs/{job_id}{last}"))
    zombie.send_signal(signal.SIGCONT)
    eventually(lambda: "the lease was lost, nothing is written" in service.output())
    assert service.job(job_id) == job
    assert service.events(job_id) == events
    with transaction(service.engine) as connection:
        mine = (job_attempts.c.job_id == job_id, job_attempts.c.number == 1)
        connection.execute(update(job_attempts).where(*mine).values(finished_at=db_now(-7200)))
    service.start_control()
    eventually(lambda: not list(service.objects.list(f"jobs/{job_id}/attempts/1")))
    service.check_invariants(job_id)


def test_f7_a_source_that_cannot_be_fetched_is_tried_again_and_said_clearly(
    service: Service, proxy: FaultyHttp
) -> None:
    proxy.fault = on("GET", "/models/", 500)
    job = run_to_its_end(service)
    assert job.error is not None
    assert (job.state, job.attempt, job.error["code"]) == ("failed", 2, "storage_unavailable")
    assert service.model_id in job.error["message"]
    proxy.fault = lambda _method, _path: None
    assert run_to_its_end(service).state == "succeeded", "nothing is left that would spoil the next job"


def test_f7_a_source_that_was_altered_on_its_way_down_is_refused(service: Service, proxy: FaultyHttp) -> None:
    proxy.fault = on("GET", "/models/", "alter")
    job = run_to_its_end(service)
    assert job.error is not None
    assert (job.state, job.error["code"]) == ("failed", "checksum_mismatch")
    proxy.fault = lambda _method, _path: None
    assert run_to_its_end(service).state == "succeeded", "the cache kept none of it"
