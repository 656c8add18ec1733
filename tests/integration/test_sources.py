"""Models and data sets fetched from a real S3 server and from an imitation of the Hub, on both kinds of database."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import update

from nightpress.core.database import db_now, transaction
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.manifest import describe_folder, digest_of
from nightpress.core.service.tables.registry import models
from nightpress.core.settings import Settings
from nightpress.core.sources.address import parse_address
from nightpress.core.wire.models import DataSetCreate, DataSetView, ModelCreate
from tests.hub import Hub
from tests.patience import slowness
from tests.registry import TENANT, World, refusal
from tests.servers import S3
from tests.service import eventually

PROSE = b"A line of prose.\n" * 50
TRAINERS = {
    "pytorch_model.bin": b"a pickle",
    "optimizer.pt": b"another",
    ".gitattributes": b"x",
    "onnx/model.onnx": b"y",
}


@pytest.fixture
def hub_world(tmp_path: Path, sqlite_url: str, hub: Hub) -> Iterator[World]:
    world = World(tmp_path, sqlite_url, hub_endpoint=hub.url, hub_organisations=["acme"])
    yield world
    world.close()


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# From a bucket ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(s3_server: S3, bert_tiny: Path) -> str:
    name = s3_server.create_bucket()
    for path, data in (files_in(bert_tiny) | TRAINERS).items():
        s3_server.client().put_object(Bucket=name, Key=f"released/tiny/{path}", Body=data)
    s3_server.client().put_object(Bucket=name, Key="texts/prose.txt", Body=PROSE)
    return name


def bucket_settings(server: S3, bucket: str) -> dict[str, Any]:
    return {
        "source_prefixes": [f"s3://{bucket}/released", f"s3://{bucket}/texts/", f"s3://{bucket}-gone"],
        "source_s3_endpoint_url": server.endpoint,
        "source_s3_access_key_id": SecretStr(server.access_key),
        "source_s3_secret_access_key": SecretStr(server.secret_key),
    }


@pytest.mark.slow
def test_a_model_in_a_bucket_is_fetched_whole_and_its_trainers_pickles_are_left(
    tmp_path: Path, sql_url: str, s3_server: S3, bucket: str, bert_tiny: Path
):
    world = World(tmp_path, sql_url, **bucket_settings(s3_server, bucket))
    model = world.fetch(f"s3://{bucket}/released/tiny/")
    assert model.left_out == [".gitattributes", "onnx/", "optimizer.pt", "pytorch_model.bin"]
    assert (model.state, model.source, model.progress) == ("ready", "s3", None), model.error
    assert model.source_url == f"s3://{bucket}/released/tiny"
    assert model.digest == digest_of(describe_folder(bert_tiny))
    assert {info.key for info in world.objects.list(f"models/{model.id}")} == {
        f"models/{model.id}/{path}" for path in files_in(bert_tiny)
    }
    assert world.fetch(f"s3://{bucket}/released/tiny").revision == model.revision
    s3_server.client().put_object(Bucket=bucket, Key="released/tiny/README.md", Body=b"newer")
    assert world.fetch(f"s3://{bucket}/released/tiny").revision != model.revision
    data = world.data_sets.create(TENANT, DataSetCreate(name="prose", source=f"s3://{bucket}/texts/prose.txt"))
    intake = world.intake()
    found = eventually(lambda: intake.advance() or _ready(world.data_sets.get(TENANT, data.id)))
    assert (found.rows, found.size) == (50, len(PROSE))
    world.close()


def _ready(view: DataSetView) -> DataSetView | None:
    return view if view.state == "ready" else None


@pytest.mark.slow
def test_what_a_bucket_lacks_or_refuses_is_said(tmp_path: Path, sqlite_url: str, s3_server: S3, bucket: str):
    given = bucket_settings(s3_server, bucket)
    world = World(tmp_path, sqlite_url, **given)
    assert refusal(world.fetch(f"s3://{bucket}/released/nothing"))[0] == "not_found"
    assert refusal(world.fetch(f"s3://{bucket}-gone/x"))[0] == "not_found"
    s3_server.client().put_object(Bucket=bucket, Key="released/old/pytorch_model.bin", Body=b"\x80\x04.")
    s3_server.client().put_object(Bucket=bucket, Key="released/old/config.json", Body=b"{}")
    code, text = refusal(world.fetch(f"s3://{bucket}/released/old"))
    assert code == "unsupported_format"
    assert "nightpress convert" in text
    world.close()
    wrong = {**given, "source_s3_secret_access_key": SecretStr("wrong")}
    stranger = World(tmp_path, sqlite_url, **wrong)
    code, text = refusal(stranger.fetch(f"s3://{bucket}/released/tiny"))
    assert code == "source_refused"
    assert "NIGHTPRESS_SOURCE_S3_ACCESS_KEY_ID" in text
    stranger.close()
    small = World(tmp_path, sqlite_url, max_model_bytes=1000, **given)
    assert refusal(small.fetch(f"s3://{bucket}/released/tiny"))[0] == "payload_too_large"
    small.close()


# From the Hub ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_branch_of_the_hub_is_pinned_to_its_commit(hub_world: World, hub: Hub, bert_tiny: Path):
    commit = hub.push("models/acme/tiny", files_in(bert_tiny) | TRAINERS)
    hub.private["models/acme/tiny"] = "hf_secret"
    assert refusal(hub_world.fetch("hf://acme/tiny"))[0] == "source_refused"
    opened = hub_world.settings.model_copy(update={"hub_token": SecretStr("hf_secret")})
    hub_world.models._settings = opened
    hub.breaks = [3000, 5000]
    model = hub_world.fetch("hf://acme/tiny@main")
    assert model.left_out == [".gitattributes", "onnx/", "optimizer.pt", "pytorch_model.bin"]
    assert (model.state, model.source, model.revision) == ("ready", "hub", commit), model.error
    assert model.digest == digest_of(describe_folder(bert_tiny))
    assert not hub.breaks, "the download broke off twice and went on where it was"
    ranges = [headers["range"] for path, headers in hub.asked if "range" in headers]
    assert ranges == ["bytes=3000-", "bytes=8000-"]
    assert not any("pytorch_model.bin" in path for path in hub.paths())
    resolved = [path for path in hub.paths() if "/resolve/" in path]
    assert all(f"/resolve/{commit}/" in path for path in resolved)


def test_weights_that_lie_there_twice_are_fetched_once(hub_world: World, hub: Hub, bert_tiny: Path):
    files = files_in(bert_tiny)
    hub.push("models/acme/twice", files | {"consolidated.safetensors": b"x" * 100, "fp16/model.safetensors": b"y"})
    model = hub_world.fetch("hf://acme/twice")
    assert model.digest == digest_of(describe_folder(bert_tiny)), model.error


def test_a_file_of_a_data_sets_repository(hub_world: World, hub: Hub):
    commit = hub.push("datasets/acme/texts", {"train/prose.txt": PROSE, "README.md": b"x"}, branch="v1")
    source = "hf://datasets/acme/texts@v1/train/prose.txt"
    made = hub_world.data_sets.create(TENANT, DataSetCreate(name="prose", source=source))
    intake = hub_world.intake()
    found = eventually(lambda: intake.advance() or _ready(hub_world.data_sets.get(TENANT, made.id)))
    assert (found.rows, found.revision, found.source_url) == (50, commit, source)
    assert b"".join(hub_world.objects.read(f"datasets/{made.id}/prose.txt")) == PROSE


@pytest.mark.slow
def test_what_the_hub_lacks_or_refuses_is_said(hub_world: World, hub: Hub, bert_tiny: Path):
    hub.push("models/acme/tiny", files_in(bert_tiny))
    hub.push("models/acme/gated", files_in(bert_tiny))
    hub.push("models/acme/pickled", {"config.json": b"{}", "pytorch_model.bin": b"\x80\x04."})
    hub.gated.add("models/acme/gated")
    assert refusal(hub_world.fetch("hf://acme/nothing"))[0] == "not_found"
    code, text = refusal(hub_world.fetch("hf://acme/tiny@v9"))
    assert (code, "revision" in text) == ("not_found", True)
    code, text = refusal(hub_world.fetch("hf://acme/gated"))
    assert (code, "NIGHTPRESS_HUB_TOKEN" in text) == ("source_refused", True)
    assert refusal(hub_world.fetch("hf://acme/pickled"))[0] == "unsupported_format"


@pytest.mark.slow
def test_a_download_is_not_led_elsewhere(hub_world: World, hub: Hub, bert_tiny: Path):
    hub.push("models/acme/tiny", files_in(bert_tiny))
    for elsewhere in ("http://169.254.169.254/latest", "https://huggingface.co.evil.example/x", "http://hf.co/x"):
        hub.elsewhere = elsewhere
        code, text = refusal(hub_world.fetch("hf://acme/tiny"))
        assert (code, "leads on" in text) == ("source_refused", True), elsewhere


# Which sources a tenant may name ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("s3://other/released/tiny", ErrorCode.PATH_NOT_ALLOWED),
        ("s3://mine/releasedx/tiny", ErrorCode.PATH_NOT_ALLOWED),
        ("s3://mine", ErrorCode.PATH_NOT_ALLOWED),
        ("s3://store/press/models/mdl_1", ErrorCode.PATH_NOT_ALLOWED),
        ("s3://store", ErrorCode.PATH_NOT_ALLOWED),
        ("s3://mine/released/../secret", ErrorCode.INVALID_REQUEST),
        ("s3://mine/released//tiny", ErrorCode.INVALID_REQUEST),
        ("s3://MINE/released", ErrorCode.INVALID_REQUEST),
        ("s3://user:pw@mine/released", ErrorCode.INVALID_REQUEST),
        ("hf://others/model", ErrorCode.PATH_NOT_ALLOWED),
        ("hf://acme/../x", ErrorCode.INVALID_REQUEST),
        ("hf://acme/model@../../etc", ErrorCode.INVALID_REQUEST),
        ("hf://acme/model@main/file", ErrorCode.INVALID_REQUEST),
        ("hf://datasets/acme/texts@main/x.txt", ErrorCode.INVALID_REQUEST),
        ("hf://acme", ErrorCode.INVALID_REQUEST),
        ("https://huggingface.co/acme/model", ErrorCode.INVALID_REQUEST),
        ("http://169.254.169.254/", ErrorCode.INVALID_REQUEST),
        ("file:///etc/passwd", ErrorCode.INVALID_REQUEST),
        ("s3://mine/released/a\u202eb", ErrorCode.INVALID_REQUEST),
    ],
)
def test_only_what_the_operator_allowed_is_a_source(source: str, code: ErrorCode):
    settings = Settings(
        _env_file=None,
        source_prefixes=["s3://mine/released", "s3://store"],
        hub_organisations=["acme"],
        storage_url="s3://store/press",
    )
    with pytest.raises(NightpressError) as refused:
        parse_address(source, "models", settings)
    assert refused.value.code is code
    assert parse_address("s3://mine/released/tiny", "models", settings).url == "s3://mine/released/tiny"
    assert parse_address("hf://Acme/tiny@refs/pr/1".replace("refs/pr/1", "refs%2Fpr%2F1"), "models", settings)


# Which process fetches -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_owner_at_a_time_and_the_next_goes_on_after_the_last_whole_file(
    hub_world: World, hub: Hub, bert_tiny: Path, monkeypatch: pytest.MonkeyPatch
):
    hub.push("models/acme/tiny", files_in(bert_tiny))
    made = hub_world.models.create(TENANT, ModelCreate(name="m", source="hf://acme/tiny"))
    first, second = hub_world.intake(), hub_world.intake()
    begun, go_on = threading.Event(), threading.Event()
    put = hub_world.objects.put_pieces

    def slow(key: str, *args: Any, **kwargs: Any) -> str:
        if key.endswith(".safetensors"):
            begun.set()
            assert go_on.wait(20 * slowness())
        return put(key, *args, **kwargs)

    monkeypatch.setattr(hub_world.objects, "put_pieces", slow)
    first.advance()
    assert begun.wait(20 * slowness())
    second.advance()
    assert second._running == {}, "what one process fetches, another leaves alone"
    before = [path for path in hub.paths() if "/resolve/" in path and not path.endswith(".safetensors")]
    assert before
    with transaction(hub_world.engine) as connection:  # as if the first process had lost the database for a minute
        connection.execute(update(models).where(models.c.id == made.id).values(claim_until=db_now(-1)))
    monkeypatch.setattr(hub_world.objects, "put_pieces", put)
    eventually(lambda: second.advance() or hub_world.models.get(TENANT, made.id).state == "ready")
    go_on.set()
    eventually(lambda: not first._running)
    model = hub_world.models.get(TENANT, made.id)
    assert model.digest == digest_of(describe_folder(bert_tiny))
    assert all(hub.paths().count(path) == 1 for path in before), "they were there already"
    assert {info.key for info in hub_world.objects.list("models")} == {
        f"models/{made.id}/{path}" for path in files_in(bert_tiny)
    }


@pytest.mark.slow
def test_a_source_that_is_down_is_tried_again(hub_world: World, hub: Hub, bert_tiny: Path):
    hub.push("models/acme/tiny", files_in(bert_tiny))
    hub_world.models._settings = hub_world.settings.model_copy(update={"hub_endpoint": "http://127.0.0.1:1"})
    made = hub_world.models.create(TENANT, ModelCreate(name="m", source="hf://acme/tiny"))
    intake = hub_world.intake()
    intake.advance()
    eventually(lambda: not intake._running)
    intake.advance()
    assert intake._running == {}, "not before half a minute is over"
    assert hub_world.models.get(TENANT, made.id).state == "fetching"
    hub_world.models._settings = hub_world.settings
    with transaction(hub_world.engine) as connection:
        connection.execute(update(models).values(claim_until=db_now(-1)))
    assert hub_world.settled(made.id).state == "ready"
    with transaction(hub_world.engine) as connection:  # attempts end after a day
        connection.execute(update(models).values(state="fetching", digest=None, created_at=db_now(-25 * 3600)))
    hub_world.models._settings = hub_world.settings.model_copy(update={"hub_endpoint": "http://127.0.0.1:1"})
    assert refusal(hub_world.settled(made.id))[0] == "source_unavailable"


@pytest.mark.slow
def test_deleted_while_it_is_fetched_it_leaves_nothing(
    hub_world: World, hub: Hub, bert_tiny: Path, monkeypatch: pytest.MonkeyPatch
):
    hub.push("models/acme/tiny", files_in(bert_tiny))
    made = hub_world.models.create(TENANT, ModelCreate(name="m", source="hf://acme/tiny"))
    put = hub_world.objects.put_pieces

    def deleting(key: str, *args: Any, **kwargs: Any) -> str:
        if key.endswith(".safetensors"):
            hub_world.models.delete(TENANT, made.id)
        return put(key, *args, **kwargs)

    monkeypatch.setattr(hub_world.objects, "put_pieces", deleting)
    intake = hub_world.intake()
    intake.advance()
    eventually(lambda: not intake._running)
    assert list(hub_world.objects.list("models")) == []
