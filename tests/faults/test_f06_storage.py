"""F6, F7: a store that refuses, is slow, forgets who we are, or alters bytes, on the way in and on the way out."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.ids import new_id
from core.jobs.records import Job
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


def on(method: str, part: str, what: int | str, times: int = 10**9) -> Fault:
    """The first so many requests of this kind meet the fault."""
    left = [times]

    def fault(asked: str, path: str) -> int | str | None:
        if asked != method or part not in path or left[0] == 0:
            return None
        left[0] -= 1
        return what

    return fault


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
    puts = [one for one in proxy.seen if one[0] == "PUT" and "/jobs/" in one[1]]
    assert len(puts) <= 2 * 2 * 4, "tries are bounded"


def test_f6_bytes_that_were_altered_on_their_way_up_are_not_taken(service: Service, proxy: FaultyHttp) -> None:
    proxy.fault = on("PUT", "/jobs/", "alter")
    job = run_to_its_end(service)
    assert job.error is not None
    assert (job.state, job.error["code"]) == ("failed", "checksum_mismatch")


def test_f6_a_large_upload_that_breaks_off_leaves_no_parts(
    service: Service, proxy: FaultyHttp, s3_server: S3, tmp_path: Path
) -> None:
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(os.urandom(17 * 1024**2))
    service.model_id, service.model_digest = service.register(new_id("mdl"), folder)
    proxy.fault = on("PUT", "partNumber=2", 500)
    job = run_to_its_end(service)
    assert job.error is not None
    assert (job.state, job.error["code"]) == ("failed", "storage_unavailable")
    bucket = service.settings.storage_url.removeprefix("s3://")
    assert not s3_server.client().list_multipart_uploads(Bucket=bucket).get("Uploads")


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
