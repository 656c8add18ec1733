"""Models and data sets that are uploaded, on both kinds of storage: sent in parts, verified, given up and swept."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from sqlalchemy import Engine

from nightpress.core.artifacts.open import open_store
from nightpress.core.artifacts.storage import ObjectStore
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.manifest import describe_folder, digest_of
from nightpress.core.service.registry.datasets import DataSetRegistry
from nightpress.core.service.registry.models import ModelRegistry
from nightpress.core.settings import Settings
from nightpress.core.wire.models import DataSetCreate, ModelCreate, UploadFile
from tests.registry import announce, announced, code_of, stored
from tests.servers import S3


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, settings: Settings) -> ObjectStore:
    if request.param == "local":
        return open_store(settings)
    server: S3 = request.getfixturevalue("s3_server")
    changes = {
        "storage_url": f"s3://{server.create_bucket()}",
        "s3_endpoint_url": server.endpoint,
        "s3_access_key_id": SecretStr(server.access_key),
        "s3_secret_access_key": SecretStr(server.secret_key),
    }
    return open_store(settings.model_copy(update=changes))


@pytest.fixture
def models(sqlite_engine: Engine, store: ObjectStore, settings: Settings) -> ModelRegistry:
    return ModelRegistry(sqlite_engine, store, settings)


@pytest.fixture
def datasets(sqlite_engine: Engine, store: ObjectStore, settings: Settings) -> DataSetRegistry:
    return DataSetRegistry(sqlite_engine, store, settings)


def send(
    registry: ModelRegistry | DataSetRegistry, row_id: str, uploads: list[UploadFile], contents: dict[str, bytes]
) -> None:
    for file in uploads:
        for part in file.parts:
            data = contents[file.path][part.offset : part.offset + part.size]
            if part.url.startswith("/"):
                registry.receive_part("t", row_id, file.path, part.number, [data], len(data))
            else:
                httpx.put(part.url, content=data, headers=part.headers, timeout=30).raise_for_status()


def contents_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_model_is_uploaded_inspected_and_ready(models: ModelRegistry, store: ObjectStore, bert_tiny: Path) -> None:
    view = models.create("t", announce(bert_tiny))
    assert (view.state, view.digest, view.parameters) == ("uploading", None, None)
    assert {file.path for file in view.uploads} == set(contents_of(bert_tiny))
    send(models, view.id, view.uploads, contents_of(bert_tiny))
    ready = models.complete("t", view.id)
    assert ready.state == "ready"
    assert ready.digest == digest_of(describe_folder(bert_tiny))
    assert (ready.model_type, ready.architecture, ready.task) == ("bert", "BertForMaskedLM", "masked-lm")
    assert ready.parameters is not None
    assert ready.parameters > 4_000_000
    assert models.complete("t", view.id) == ready
    assert models.uploads("t", view.id) == []
    header = models.header(view.id)
    assert header.parameters == ready.parameters
    assert sorted(stored(store)) == sorted(f"models/{view.id}/{path}" for path in contents_of(bert_tiny))


@pytest.mark.slow
def test_an_upload_goes_on_where_it_stopped(models: ModelRegistry, bert_tiny: Path) -> None:
    view = models.create("t", announce(bert_tiny))
    first, *rest = view.uploads
    send(models, view.id, [first], contents_of(bert_tiny))
    with pytest.raises(NightpressError) as error:
        models.complete("t", view.id)
    assert code_of(error) is ErrorCode.CONFLICT
    assert sorted(error.value.details["missing"]) == sorted(file.path for file in rest)
    missing = models.uploads("t", view.id)
    assert {file.path for file in missing} == {file.path for file in rest}
    send(models, view.id, missing, contents_of(bert_tiny))
    assert models.complete("t", view.id).state == "ready"


def test_other_bytes_than_announced_fail_the_model_and_leave_nothing(
    models: ModelRegistry, store: ObjectStore, bert_tiny: Path
) -> None:
    view = models.create("t", announce(bert_tiny))
    contents = contents_of(bert_tiny)
    changed = {**contents, "model.safetensors": contents["model.safetensors"][:-1] + b"\x7f"}
    # Each part is checked when it arrives, so a part with other bytes does not count as sent.
    with pytest.raises((NightpressError, httpx.HTTPStatusError)):
        send(models, view.id, view.uploads, changed)
    assert "model.safetensors" in {file.path for file in models.uploads("t", view.id)}
    models.delete("t", view.id)
    assert stored(store) == []


@pytest.mark.slow
def test_a_model_that_is_not_one_fails_with_the_file_named_and_leaves_nothing(
    models: ModelRegistry, store: ObjectStore, bert_tiny: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(bert_tiny, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    view = models.create("t", announce(folder))
    send(models, view.id, view.uploads, contents_of(folder))
    with pytest.raises(NightpressError) as error:
        models.complete("t", view.id)
    assert code_of(error) is ErrorCode.MALFORMED_MODEL
    assert error.value.details["file"] == "model.safetensors"
    failed = models.get("t", view.id)
    assert failed.state == "failed"
    assert failed.error is not None
    assert failed.error["code"] == "malformed_model"
    assert stored(store) == []
    for attempt in (lambda: models.complete("t", view.id), lambda: models.header(view.id)):
        with pytest.raises(NightpressError) as error:
            attempt()
        assert code_of(error) is ErrorCode.CONFLICT


def test_an_upload_given_up_leaves_nothing(models: ModelRegistry, store: ObjectStore, bert_tiny: Path) -> None:
    view = models.create("t", announce(bert_tiny))
    send(models, view.id, view.uploads[:2], contents_of(bert_tiny))
    models.delete("t", view.id)
    with pytest.raises(NightpressError) as error:
        models.get("t", view.id)
    assert code_of(error) is ErrorCode.NOT_FOUND
    assert stored(store) == []
    assert store.sweep_uploads(older_than_s=-5) == 0


def test_abandoned_uploads_are_swept(models: ModelRegistry, store: ObjectStore, bert_tiny: Path) -> None:
    view = models.create("t", announce(bert_tiny))
    assert models.sweep_abandoned(older_than_s=3600) == 0
    assert models.sweep_abandoned(older_than_s=-5) == 1
    assert models.get("t", view.id).state == "failed"
    assert store.sweep_uploads(older_than_s=-5) == 0


@pytest.mark.slow
def test_what_was_given_up_while_it_was_verified_stays_given_up(
    models: ModelRegistry, store: ObjectStore, bert_tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = models.create("t", announce(bert_tiny))
    send(models, view.id, view.uploads, contents_of(bert_tiny))
    verify = models._verify_upload

    def slowly(*arguments: Any, **more: Any) -> Any:
        verified = verify(*arguments, **more)
        models.sweep_abandoned(older_than_s=-5)
        return verified

    monkeypatch.setattr(models, "_verify_upload", slowly)
    with pytest.raises(NightpressError) as error:
        models.complete("t", view.id)
    assert code_of(error) is ErrorCode.CONFLICT
    assert models.get("t", view.id).state == "failed"
    assert stored(store) == []


@pytest.mark.slow
def test_an_empty_file_needs_no_upload(models: ModelRegistry, store: ObjectStore, bert_tiny: Path) -> None:
    request = announce(bert_tiny)
    request = request.model_copy(update={"files": [*request.files, announced("merges.txt", b"")]})
    view = models.create("t", request)
    assert "merges.txt" not in {file.path for file in view.uploads}
    send(models, view.id, view.uploads, contents_of(bert_tiny))
    assert models.complete("t", view.id).state == "ready"


def test_a_data_set_is_uploaded_and_counted(datasets: DataSetRegistry, store: ObjectStore) -> None:
    data = gzip.compress(b'{"text": "good", "label": 1}\n\n{"text": "b\xc3\xa4d", "label": 0}\n', mtime=0)
    view = datasets.create("t", DataSetCreate(name="reviews", file=announced("reviews.jsonl.gz", data)))
    send(datasets, view.id, view.uploads, {"reviews.jsonl.gz": data})
    ready = datasets.complete("t", view.id)
    assert (ready.state, ready.rows, ready.labelled) == ("ready", 2, True)
    assert stored(store) == [f"datasets/{view.id}/reviews.jsonl.gz"]
    datasets.delete("t", view.id)
    assert stored(store) == []


@pytest.mark.slow
def test_an_upload_is_cleared_of_what_the_model_does_not_need(
    models: ModelRegistry, store: ObjectStore, bert_tiny: Path
) -> None:
    """Names that no model has are not asked for. Weights that the index doesn't name are deleted once the index can be read."""
    contents = contents_of(bert_tiny)
    weights = contents.pop("model.safetensors")
    length = int.from_bytes(weights[:8], "little")
    names = [name for name in json.loads(weights[8 : 8 + length]) if name != "__metadata__"]
    index = json.dumps({"weight_map": dict.fromkeys(names, "m-1.safetensors")}).encode()
    needed = contents | {"m-1.safetensors": weights, "model.safetensors.index.json": index}
    contents = needed | {"model.safetensors": weights, "onnx/config.json": b"{", "run.py": b"import os", "x.bin": b"x"}
    view = models.create("t", ModelCreate(name="m", files=[announced(*item) for item in contents.items()]))
    assert view.left_out == ["run.py", "x.bin"]
    assert {file.path for file in view.uploads} == contents.keys() - {"run.py", "x.bin"}
    send(models, view.id, view.uploads, contents)
    ready = models.complete("t", view.id)
    assert {file.path for file in ready.files} == needed.keys()
    assert ready.left_out == ["model.safetensors", "onnx/", "run.py", "x.bin"]
    assert sorted(stored(store)) == sorted(f"models/{view.id}/{path}" for path in needed)
    assert models.get("t", view.id) == ready
