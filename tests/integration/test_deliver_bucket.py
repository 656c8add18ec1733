"""Deliveries to a bucket of a real S3 server: whole, resumed after a kill, cancelled, replaced and refused."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.manifest import ATTESTATION_FILE
from nightpress.core.service.deliveries.bucket import BucketSender
from tests.databases import migrated_sqlite
from tests.deliveries import FILES, TENANT, World, large_files
from tests.servers import S3
from tests.service import eventually

BUNDLED = {"README.md", "report.html", "report.json", ATTESTATION_FILE}
MIB = 1024**2


@pytest.fixture
def bucket(s3_server: S3) -> str:
    return s3_server.create_bucket()


@pytest.fixture
def world(tmp_path: Path, s3_server: S3, bucket: str) -> Iterator[World]:
    world = World(
        tmp_path,
        migrated_sqlite(tmp_path / "nightpress.db"),
        destinations=[f"s3://{bucket}/out"],
        destination_s3_endpoint_url=s3_server.endpoint,
    )
    secrets = {"access_key_id": s3_server.access_key, "secret_access_key": s3_server.secret_key}
    world.credentials(f"s3://{bucket}", **secrets)
    yield world
    world.close()


def objects_in(server: S3, bucket: str) -> dict[str, bytes]:
    client = server.client()
    listed = client.list_objects_v2(Bucket=bucket).get("Contents", [])
    return {entry["Key"]: client.get_object(Bucket=bucket, Key=entry["Key"])["Body"].read() for entry in listed}


@pytest.mark.slow
def test_an_accepted_artifact_arrives_with_card_report_and_statement(world: World, s3_server: S3, bucket: str) -> None:
    job_id = world.accept(destinations=[f"s3://{bucket}/out/{{model}}/{{job}}"])
    done = world.run()
    folder = f"out/tiny/{job_id}/"
    there = objects_in(s3_server, bucket)
    assert there.keys() == {folder + path for path in FILES.keys() | BUNDLED}
    assert {path: there[folder + path] for path in FILES} == FILES
    assert b"model-index" in there[folder + "README.md"]
    assert (done.state, done.attempts, done.error) == ("delivered", 1, None)
    assert done.result == {
        "url": f"s3://{bucket}/{folder}".rstrip("/"),
        "files": len(there),
        "bytes": sum(map(len, there.values())),
    }
    assert done.sent_bytes == done.total_bytes == done.result["bytes"]
    assert [(tried.number, tried.error, tried.sent_bytes) for tried in done.log] == [(1, None, done.total_bytes)]


def test_what_is_rejected_is_not_delivered(world: World, bucket: str) -> None:
    world.accept(destinations=[f"s3://{bucket}/out/x"], verdict="rejected")
    assert world.deliveries() == []


@pytest.mark.slow
def test_a_large_file_goes_on_at_the_part_where_a_killed_process_stopped(
    world: World, s3_server: S3, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = large_files(100 * MIB)
    world.accept({"onnx": files}, destinations=[f"s3://{bucket}/out/x"])
    killed = world.new_courier(ttl_s=0.0)  # its claim is over at once: nobody renews it

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt  # no handler of ours runs between this and the end of the thread

    with monkeypatch.context() as patch:
        patch.setattr("nightpress.core.service.deliveries.bucket.BucketSender._finish_parts", die)
        killed.advance()
        eventually(lambda: not killed.running)
    assert world.deliveries()[0].state == "pending"
    world_after = world.run()
    assert world_after.state == "delivered"
    assert objects_in(s3_server, bucket)["out/x/model.onnx"] == files["model.onnx"]
    [last] = world_after.log
    assert last.sent_bytes < 2 * MIB < world_after.total_bytes  # all parts were there already


@pytest.mark.slow
def test_the_result_before_is_removed_and_other_files_stay(world: World, s3_server: S3, bucket: str) -> None:
    s3_server.client().put_object(Bucket=bucket, Key="out/x/notes.txt", Body=b"mine")
    world.accept({"onnx": {**FILES, "old.bin": b"old"}}, destinations=[f"s3://{bucket}/out/x"])
    assert world.run().state == "delivered"
    world.accept(destinations=[f"s3://{bucket}/out/x"])
    assert world.run().state == "delivered"
    there = objects_in(s3_server, bucket)
    assert there.keys() == {f"out/x/{path}" for path in FILES.keys() | BUNDLED | {"notes.txt"}}
    statement = json.loads(base64.b64decode(json.loads(there[f"out/x/{ATTESTATION_FILE}"])["dsseEnvelope"]["payload"]))
    assert statement["predicate"]["nightpress"]["job"] == world.deliveries()[0].job_id


@pytest.mark.slow
def test_a_delivery_is_cancelled_while_it_runs_and_goes_on_when_retried(
    world: World, s3_server: S3, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.accept({"onnx": large_files(40 * MIB)}, destinations=[f"s3://{bucket}/out/x"])
    [delivery] = world.deliveries()
    keep = BucketSender._put_parts

    def cancelled_meanwhile(self: BucketSender, *given: object) -> None:
        assert world.store.cancel(TENANT, delivery.id).state == "cancelled"
        world.courier.advance()
        keep(self, *given)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(BucketSender, "_put_parts", cancelled_meanwhile)
        ended = world.run()
    assert (ended.state, ended.log) == ("cancelled", [])
    assert "out/x/model.onnx" not in objects_in(s3_server, bucket)
    assert world.store.retry(TENANT, delivery.id).state == "pending"
    assert world.run().state == "delivered"


def test_a_wrong_key_fails_at_once_and_the_right_one_delivers(world: World, s3_server: S3, bucket: str) -> None:
    credentials = world.resources.credentials
    stored = credentials.page(TENANT, cursor=None, limit=10)[0][0]
    wrong = {"access_key_id": s3_server.access_key, "secret_access_key": "wrong"}
    credentials.delete(TENANT, stored.id)
    stored = world.credentials(f"s3://{bucket}", **wrong)
    world.accept(destinations=[f"s3://{bucket}/out/x"])
    failed = world.run()
    assert failed.state == "failed"
    assert failed.error is not None
    assert failed.error["code"] == "destination_refused"
    assert "wrong" not in str(failed)
    credentials.delete(TENANT, stored.id)
    world.credentials(f"s3://{bucket}", access_key_id=s3_server.access_key, secret_access_key=s3_server.secret_key)
    world.store.retry(TENANT, failed.id)
    assert world.run().state == "delivered"


@pytest.mark.slow
def test_a_store_that_is_away_is_tried_again(world: World, bucket: str, s3_server: S3) -> None:
    away = World.__new__(World)
    away.__dict__ = {**world.__dict__}
    away.settings = world.settings.model_copy(update={"destination_s3_endpoint_url": "http://127.0.0.1:1"})
    world.accept(destinations=[f"s3://{bucket}/out/x"])
    courier = away.new_courier()
    tried = world.run(courier)
    courier.close()
    assert (tried.state, tried.attempts) == ("pending", 1)
    assert tried.error is not None
    assert tried.error["code"] == "destination_unavailable"
    assert tried.next_at is not None
    assert 3 < (tried.next_at - tried.log[0].at).total_seconds() < 7
    world.store.retry(TENANT, tried.id)  # now, without the pause
    assert world.run().state == "delivered"


@pytest.mark.slow
def test_only_allowed_prefixes_and_no_storage_of_the_service(world: World, bucket: str) -> None:
    job_id = world.accept()
    for url, code in (
        (f"s3://{bucket}/outside", ErrorCode.PATH_NOT_ALLOWED),
        (f"s3://{bucket}/outer", ErrorCode.PATH_NOT_ALLOWED),
        ("s3://another/out", ErrorCode.PATH_NOT_ALLOWED),
        (f"s3://{bucket}/out/../x", ErrorCode.INVALID_REQUEST),
        (f"s3://{bucket}/out/{{user}}", ErrorCode.INVALID_REQUEST),
        ("ftp://host/x", ErrorCode.INVALID_REQUEST),
    ):
        with pytest.raises(NightpressError) as refused:
            world.store.add(TENANT, job_id, [url])
        assert refused.value.code is code, url
    assert world.deliveries() == []
