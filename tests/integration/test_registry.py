"""Models and data sets in folders of the server, data that can't be used, who sees what, and what may be deleted."""

import gzip
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from nightpress.core.artifacts.open import open_store
from nightpress.core.database import make_engine
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.manifest import describe_folder, digest_of
from nightpress.core.service.jobs.records import NewJob
from nightpress.core.service.jobs.store import JobStore
from nightpress.core.service.registry.datasets import DataSetRegistry
from nightpress.core.service.registry.models import ModelRegistry
from nightpress.core.settings import Settings
from nightpress.core.wire.models import DataSetCreate, DataSetView, ModelCreate
from tests.hub_cache import hub_snapshot
from tests.registry import announce, announced, code_of, stored


@pytest.fixture
def engine(sqlite_engine: Engine) -> Engine:
    return sqlite_engine


@pytest.fixture
def any_engine(sql_url: str) -> Iterator[Engine]:
    engine = make_engine(sql_url)
    yield engine
    engine.dispose()


@pytest.fixture
def local_models(engine: Engine, settings: Settings) -> ModelRegistry:
    return ModelRegistry(engine, open_store(settings), settings)


@pytest.fixture
def local_datasets(engine: Engine, settings: Settings) -> DataSetRegistry:
    return DataSetRegistry(engine, open_store(settings), settings)


# Server paths --------------------------------------------------------------------------------------------------------


@pytest.fixture
def allowed(settings: Settings, bert_tiny: Path) -> Path:
    (root,) = settings.model_roots
    shutil.copytree(bert_tiny, root / "tiny")
    return root


def test_a_server_folder_is_ready_at_once_and_stays_where_it_is(local_models: ModelRegistry, allowed: Path) -> None:
    view = local_models.create("t", ModelCreate(name="tiny", path=str(allowed / "tiny")))
    assert (view.state, view.source, view.model_type) == ("ready", "path", "bert")
    assert view.digest == digest_of(describe_folder(allowed / "tiny"))
    local_models.delete("t", view.id)
    assert (allowed / "tiny" / "model.safetensors").exists()


def test_only_allowed_folders_can_be_named(local_models: ModelRegistry, allowed: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    shutil.copytree(allowed / "tiny", outside)
    (allowed / "link").symlink_to(outside)
    (allowed / "loop").symlink_to(allowed / "loop")
    names = [
        str(outside),
        str(allowed / ".." / "outside"),
        str(allowed / "link"),
        "tiny",
        "/",
        "/no/such",
        str(allowed) + "-twin",
    ]
    for name in names:
        with pytest.raises(NightpressError) as error:
            local_models.create("t", ModelCreate(name="tiny", path=name))
        assert code_of(error) is ErrorCode.PATH_NOT_ALLOWED, name
    with pytest.raises(NightpressError) as error:
        local_models.create("t", ModelCreate(name="tiny", path=str(allowed / "nothing")))
    assert code_of(error) is ErrorCode.NOT_FOUND


def test_a_link_out_of_an_allowed_folder_is_refused(local_models: ModelRegistry, allowed: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    (allowed / "tiny" / "generation_config.json").symlink_to(secret)
    with pytest.raises(NightpressError) as error:
        local_models.create("t", ModelCreate(name="tiny", path=str(allowed / "tiny")))
    assert code_of(error) is ErrorCode.PATH_NOT_ALLOWED
    assert error.value.details["file"] == "generation_config.json"


def test_a_snapshot_of_the_hubs_cache_is_registered_in_place(
    local_models: ModelRegistry, allowed: Path, bert_tiny: Path
) -> None:
    snapshot = hub_snapshot(bert_tiny, allowed)
    view = local_models.create("t", ModelCreate(name="cached", path=str(snapshot)))
    assert (view.state, view.digest) == ("ready", digest_of(describe_folder(bert_tiny)))


def test_links_lead_to_no_blobs_that_the_operator_did_not_allow(
    engine: Engine, settings: Settings, tmp_path: Path, bert_tiny: Path
) -> None:
    snapshot = hub_snapshot(bert_tiny, tmp_path)
    settings = settings.model_copy(update={"model_roots": [snapshot.parent]})
    registry = ModelRegistry(engine, open_store(settings), settings)
    with pytest.raises(NightpressError) as error:
        registry.create("t", ModelCreate(name="cached", path=str(snapshot)))
    assert code_of(error) is ErrorCode.PATH_NOT_ALLOWED


def test_a_link_to_another_file_of_the_folder_is_followed(local_models: ModelRegistry, allowed: Path) -> None:
    folder = allowed / "tiny"
    (folder / "model.safetensors").rename(folder / ".weights")
    (folder / "model.safetensors").symlink_to(".weights")
    view = local_models.create("t", ModelCreate(name="tiny", path=str(folder)))
    assert view.state == "ready"
    assert {file.path: file.size for file in view.files}["model.safetensors"] > 1_000_000


def test_a_link_to_a_folder_is_refused_where_its_files_would_be_missing(
    local_models: ModelRegistry, allowed: Path
) -> None:
    folder = allowed / "tiny"
    (folder / ".modules").mkdir()
    (folder / ".modules" / "config.json").write_text("{}")
    (folder / "1_Pooling").symlink_to(".modules")
    with pytest.raises(NightpressError, match="1_Pooling is a link to a folder") as error:
        local_models.create("t", ModelCreate(name="tiny", path=str(folder)))
    assert "cp -rL" in error.value.hint


def test_what_lies_beside_a_model_in_a_server_folder_is_left_there(local_models: ModelRegistry, allowed: Path) -> None:
    before = local_models.create("t", ModelCreate(name="tiny", path=str(allowed / "tiny")))
    for name in ("optimizer.pt", "training_args.bin", "model.gguf", ".DS_Store"):
        (allowed / "tiny" / name).touch()
    (allowed / "tiny" / "onnx").mkdir()
    (allowed / "tiny" / "onnx" / "config.json").write_text("{")
    (allowed / "tiny" / "run.py").symlink_to("/etc/passwd")
    view = local_models.create("t", ModelCreate(name="tiny", path=str(allowed / "tiny")))
    assert (view.digest, view.files) == (before.digest, before.files)
    assert view.left_out == [".DS_Store", "model.gguf", "onnx/", "optimizer.pt", "run.py", "training_args.bin"]
    assert local_models.get("t", view.id).left_out == view.left_out


def test_a_data_set_from_the_server(local_datasets: DataSetRegistry, allowed: Path) -> None:
    (allowed / "prose.txt").write_text("One line.\n\nAnother.\n")
    view = local_datasets.create("t", DataSetCreate(name="prose", path=str(allowed / "prose.txt")))
    assert (view.state, view.rows, view.labelled, view.source) == ("ready", 2, False, "path")


# Data that can't be used ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "code"),
    [
        ("a.jsonl", b"", ErrorCode.INVALID_DATA),
        ("a.txt", b"\n  \n", ErrorCode.INVALID_DATA),
        ("a.txt", b"caf\xe9", ErrorCode.INVALID_DATA),
        ("a.txt", b"cut \xc3", ErrorCode.INVALID_DATA),
        ("a.txt", b"a\0b", ErrorCode.INVALID_DATA),
        ("a.jsonl", b"{text: 1}\n", ErrorCode.INVALID_DATA),
        ("a.jsonl", b'["text"]\n', ErrorCode.INVALID_DATA),
        ("a.jsonl", b'{"label": 1}\n', ErrorCode.INVALID_DATA),
        ("a.jsonl", b'{"text": "x", "label": -100000}\n', ErrorCode.INVALID_DATA),
        ("a.jsonl", b'{"text": "x", "label": {"a": 1}}\n', ErrorCode.INVALID_DATA),
        ("a.jsonl", b'{"text": "x", "label": 0}\n{"text": "y"}\n', ErrorCode.INVALID_DATA),
        ("a.jsonl", b'{"text": "x"}\n{"text": "y", "label": 1}\n', ErrorCode.INVALID_DATA),
        ("a.jsonl", b"[" * 100_000, ErrorCode.INVALID_DATA),
        ("a.jsonl", b'{"text": "' + b"x" * 3_000_000 + b'"}', ErrorCode.INVALID_DATA),
        ("a.txt.gz", b"not gzip", ErrorCode.INVALID_DATA),
        ("a.txt.gz", gzip.compress(b"some text" * 1000, mtime=0)[:-20], ErrorCode.INVALID_DATA),
        ("a.txt.gz", gzip.compress(b"x" * 40_000_000, mtime=0), ErrorCode.PAYLOAD_TOO_LARGE),
        ("a.csv", b"text,label\n", ErrorCode.INVALID_DATA),
        ("b.csv", b"words,label\nx,1\n", ErrorCode.INVALID_DATA),
        ("a.parquet", b"PAR1 and no end", ErrorCode.INVALID_DATA),
        ("a.xlsx", b"PK", ErrorCode.UNSUPPORTED_FORMAT),
        ("a.pkl", b"\x80\x04.", ErrorCode.UNSUPPORTED_FORMAT),
    ],
)
def test_data_that_cannot_be_used_is_refused(
    engine: Engine, settings: Settings, tmp_path: Path, name: str, data: bytes, code: ErrorCode
) -> None:
    settings = settings.model_copy(update={"max_dataset_bytes": 20_000_000})
    registry = DataSetRegistry(engine, open_store(settings), settings)
    (root,) = settings.model_roots
    root.mkdir()
    (root / name).write_bytes(data)
    with pytest.raises(NightpressError) as error:
        registry.create("t", DataSetCreate(name="data", path=str(root / name)))
    assert code_of(error) is code
    assert error.value.details.get("file", name) == name
    assert [view.source for view in registry.page("t")[0]] == ["builtin", "builtin"]


def test_long_lines_of_prose_are_only_cut(local_datasets: DataSetRegistry, settings: Settings) -> None:
    (root,) = settings.model_roots
    root.mkdir()
    (root / "a.txt").write_text("x" * 3_000_000)
    assert local_datasets.create("t", DataSetCreate(name="data", path=str(root / "a.txt"))).rows


# Who sees what -------------------------------------------------------------------------------------------------------


def test_another_tenants_things_look_missing(local_models: ModelRegistry, bert_tiny: Path) -> None:
    view = local_models.create("t", announce(bert_tiny))
    attempts = (
        lambda reference: local_models.get("other", reference),
        lambda reference: local_models.uploads("other", reference),
        lambda reference: local_models.receive_part("other", reference, "config.json", 1, [b""], 0),
        lambda reference: local_models.complete("other", reference),
        lambda reference: local_models.delete("other", reference),
    )
    for attempt in attempts:
        told = []
        for reference in (view.id, view.name, "mdl_none"):
            with pytest.raises(NightpressError) as error:
                attempt(reference)
            assert code_of(error) is ErrorCode.NOT_FOUND
            told.append(error.value.message.replace(reference, "…"))
        assert len(set(told)) == 1
    assert local_models.page("other") == ([], None)
    assert local_models.get("t", view.id).state == "uploading"


def test_a_name_means_the_newest_that_is_ready(local_models: ModelRegistry, allowed: Path, bert_tiny: Path) -> None:
    create = ModelCreate(name="tiny", path=str(allowed / "tiny"))
    local_models.create("t", create)
    newest = local_models.create("t", create)
    local_models.create("t", announce(bert_tiny))
    assert local_models.get("t", "tiny").id == newest.id


def test_pages_give_each_once_newest_first(local_datasets: DataSetRegistry, settings: Settings) -> None:
    (root,) = settings.model_roots
    root.mkdir()
    (root / "a.txt").write_text("text")
    made = [local_datasets.create("t", DataSetCreate(name=f"d{n}", path=str(root / "a.txt"))).id for n in range(4)]
    for limit in (1, 2, 3, 4, 5, 50):
        seen: list[DataSetView] = []
        cursor = None
        while True:
            items, cursor = local_datasets.page("t", cursor=cursor, limit=limit)
            assert len(items) <= limit
            seen += items
            if cursor is None:
                break
        assert [view.id for view in seen] == [*reversed(made), "builtin:code", "builtin:prose"]
    assert local_datasets.get("t", "builtin:prose").state == "ready"


# Requests that make no sense -----------------------------------------------------------------------------------------


def test_announcements_that_make_no_sense_are_refused(local_models: ModelRegistry, settings: Settings) -> None:
    config = announced("config.json", b"{}")
    cases = {
        ErrorCode.INVALID_REQUEST: [
            ModelCreate(name="m"),
            ModelCreate(name="m", files=[config], path="/x"),
            ModelCreate(name="m", files=[config, config]),
            ModelCreate(name="m", files=[config.model_copy(update={"part_sha256": ["0" * 64] * 2})]),
        ],
        ErrorCode.MALFORMED_MODEL: [
            ModelCreate(name="m", files=[announced("../config.json", b"{}")]),
            ModelCreate(name="m", files=[config, announced("Config.json", b"{}")]),
        ],
        ErrorCode.UNSUPPORTED_FORMAT: [
            ModelCreate(name="m", files=[config, announced("pytorch_model.bin", b"x")]),
            ModelCreate(name="m", files=[config, announced("model.zip", b"x")]),
        ],
        ErrorCode.PAYLOAD_TOO_LARGE: [
            ModelCreate(name="m", files=[config.model_copy(update={"size": settings.max_model_bytes + 1})])
        ],
        ErrorCode.CHECKSUM_MISMATCH: [ModelCreate(name="m", files=[config.model_copy(update={"size": 0})])],
    }
    for code, requests in cases.items():
        for request in requests:
            with pytest.raises(NightpressError) as error:
                local_models.create("t", request)
            assert code_of(error) is code
    assert local_models.page("t") == ([], None)
    assert stored(open_store(settings)) == []


def test_parts_nobody_awaits_are_refused(local_models: ModelRegistry, bert_tiny: Path) -> None:
    view = local_models.create("t", announce(bert_tiny))
    size = (bert_tiny / "config.json").stat().st_size
    for path, number, length, code in [
        ("config.json", 2, size, ErrorCode.NOT_FOUND),
        ("config.json", 0, size, ErrorCode.NOT_FOUND),
        ("../../x", 1, 4, ErrorCode.NOT_FOUND),
        ("config.json", 1, size + 1, ErrorCode.PAYLOAD_TOO_LARGE),
        ("config.json", 1, size - 1, ErrorCode.INVALID_REQUEST),
    ]:
        with pytest.raises(NightpressError) as error:
            local_models.receive_part("t", view.id, path, number, [b"x" * length], length)
        assert code_of(error) is code


def test_what_a_job_needs_is_not_deleted(any_engine: Engine, settings: Settings, bert_tiny: Path) -> None:
    models = ModelRegistry(any_engine, open_store(settings), settings)
    datasets = DataSetRegistry(any_engine, open_store(settings), settings)
    (root,) = settings.model_roots
    shutil.copytree(bert_tiny, root / "tiny")
    (root / "a.txt").write_text("text")
    model = models.create("t", ModelCreate(name="tiny", path=str(root / "tiny")))
    data = datasets.create("t", DataSetCreate(name="data", path=str(root / "a.txt")))
    assert models.header(model.id).model_type == "bert"
    assert model.digest is not None
    new = NewJob(
        tenant_id="t",
        model_id=model.id,
        model_name=model.name,
        model_digest=model.digest,
        recipe={},
        queue="cpu",
        needs_memory=1,
        run_limit_s=10,
        stall_s=10,
        max_failures=3,
        data={data.name: {"id": data.id}},
    )
    store = JobStore(any_engine)
    job, _ = store.submission.submit(new, max_queued=10)
    for registry, record in ((models, model), (datasets, data)):
        with pytest.raises(NightpressError) as error:
            registry.delete("t", record.id)
        assert code_of(error) is ErrorCode.CONFLICT
    store.requests.request_cancel("t", job.id)
    models.delete("t", model.id)
    datasets.delete("t", data.id)
    assert models.page("t") == ([], None)


def test_json_survives_both_databases(any_engine: Engine, settings: Settings, bert_tiny: Path) -> None:
    models = ModelRegistry(any_engine, open_store(settings), settings)
    (root,) = settings.model_roots
    shutil.copytree(bert_tiny, root / "tiny")
    config = json.loads((root / "tiny" / "config.json").read_text())
    (root / "tiny" / "config.json").write_text(json.dumps({**config, "note": "naïve 😀", "tiny": 1e-300}))
    view = models.create("t", ModelCreate(name="tiny", path=str(root / "tiny")))
    assert models.header(view.id).config["note"] == "naïve 😀"
    uploading = models.create("t", announce(bert_tiny))
    assert models.get("t", uploading.id).error is None
