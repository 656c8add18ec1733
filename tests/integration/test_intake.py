"""What is verified and read beside a request because it takes long or failed there, on both kinds of database."""

import hashlib
from pathlib import Path

import pytest

from nightpress.core.handoff.manifest import describe_folder, digest_of
from nightpress.core.wire.models import DataSetCreate, ModelCreate
from tests.registry import TENANT, World, refusal
from tests.service import eventually


@pytest.mark.slow
def test_what_is_too_large_for_a_request_is_verified_beside_it(tmp_path: Path, sql_url: str, bert_tiny: Path):
    world = World(tmp_path, sql_url, verify_inline_bytes=0, model_roots=[bert_tiny.parent])
    made = world.models.create(TENANT, ModelCreate(name="tiny", path=str(bert_tiny)))
    assert (made.state, made.digest) == ("verifying", None)
    model = world.settled(made.id)
    assert (model.state, model.digest) == ("ready", digest_of(describe_folder(bert_tiny)))
    files = [{"path": file.path, "size": file.size, "sha256": file.sha256} for file in describe_folder(bert_tiny)]
    for damaged in (False, True):
        made = world.models.create(TENANT, ModelCreate.model_validate({"name": "up", "files": files}))
        for file in made.uploads:
            data = (bert_tiny / file.path).read_bytes()
            world.models.receive_part(TENANT, made.id, file.path, 1, [data], len(data))
        if damaged:  # after the upload, on the disk
            parts = (world.settings.data_dir / "objects" / ".np-uploads").rglob("1")
            part = max(parts, key=lambda path: path.stat().st_size)
            part.write_bytes(bytes(part.stat().st_size))
        asked = world.models.complete(TENANT, made.id)
        assert asked.state == "verifying"
        assert world.models.complete(TENANT, made.id).state == "verifying"
        model = world.settled(made.id)
        if damaged:
            assert refusal(model)[0] == "checksum_mismatch"
        else:
            assert model.state == "ready"
    world.close()


def test_what_nobody_foresaw_is_tried_for_a_while_and_then_given_up(
    tmp_path: Path, sql_url: str, monkeypatch: pytest.MonkeyPatch
):
    world = World(tmp_path, sql_url, verify_inline_bytes=0, model_roots=[tmp_path])
    (tmp_path / "a.txt").write_text("text")
    tries: list[str] = []

    def broken(path: Path, *_: object, **__: object) -> None:
        tries.append(path.name)
        raise ZeroDivisionError("a reader with a fault of its own")

    monkeypatch.setattr(world.data_sets, "_examine_path", broken)
    made = world.data_sets.create(TENANT, DataSetCreate(name="d", path=str(tmp_path / "a.txt")))
    intake = world.patient_intake(pause_s=0.1, patience_with_us_s=1.0)

    def over() -> bool:
        intake.advance()
        return world.data_sets.get(TENANT, made.id).state == "failed"

    eventually(over)
    data_set = world.data_sets.get(TENANT, made.id)
    assert len(tries) > 1
    assert data_set.error is not None
    assert data_set.error["code"] == "internal"
    count = len(tries)
    intake.advance()
    eventually(lambda: not intake._running)
    assert len(tries) == count
    assert intake._failing_since == {}
    world.close()


def test_what_nobody_foresaw_in_a_request_is_left_to_the_intake(
    tmp_path: Path, sql_url: str, monkeypatch: pytest.MonkeyPatch
):
    world = World(tmp_path, sql_url)
    data = b"text"
    file = {"path": "a.txt", "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    made = world.data_sets.create(TENANT, DataSetCreate.model_validate({"name": "d", "file": file}))
    world.data_sets.receive_part(TENANT, made.id, "a.txt", 1, [data], len(data))
    examine = world.data_sets._examine_stored
    monkeypatch.setattr(world.data_sets, "_examine_stored", lambda *_, **__: 1 // 0)
    assert world.data_sets.complete(TENANT, made.id).state == "verifying"
    monkeypatch.setattr(world.data_sets, "_examine_stored", examine)
    intake = world.intake()

    def ready() -> bool:
        intake.advance()
        return world.data_sets.get(TENANT, made.id).state == "ready"

    eventually(ready)
    world.close()


@pytest.mark.slow
def test_data_that_takes_long_to_read_is_read_beside_the_request(tmp_path: Path, sql_url: str):
    world = World(tmp_path, sql_url, model_roots=[tmp_path])
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 60_000)
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n' * 60_000 + "no JSON\n")
    made = [
        world.data_sets.create(TENANT, DataSetCreate(name=name, path=str(tmp_path / name)))
        for name in ("a.jsonl", "bad.jsonl")
    ]
    assert [item.state for item in made] == ["verifying", "verifying"]
    intake = world.intake()

    def over() -> bool:
        intake.advance()
        return all(world.data_sets.get(TENANT, item.id).state in {"ready", "failed"} for item in made)

    eventually(over)
    assert world.data_sets.get(TENANT, made[0].id).rows == 60_000
    assert "line 60001 is not JSON" in refusal(world.data_sets.get(TENANT, made[1].id))[1]
    world.close()
