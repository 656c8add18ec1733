"""Which jobs share the checkpoints of their first passes, and when a pass counts as done."""

from pathlib import Path
from typing import Any

import pytest

from nightpress.core.handoff.checkpoints import FinishedPass, pass_folder, pass_record, prefix_digests
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.models import parse_recipe

PASSES = [{"pass": "sparsegpt", "pattern": "2:4"}, {"pass": "gptq", "bits": 4}]
WORLD = {
    "tenant_id": "one",
    "model_digest": "sha256:1",
    "data": {"mine": "sha256:2", "theirs": "sha256:3"},
    "device": "cpu",
    "engine": "1",
}


def digests(*, world: dict[str, Any] | None = None, **changes: Any) -> list[str]:
    recipe: dict[str, Any] = {
        "name": "r",
        "passes": PASSES,
        "exports": ["compressed-tensors"],
        "calibration": {"data": "mine"},
    }
    return prefix_digests(parse_recipe(recipe | changes), **(WORLD | (world or {})))


def test_one_digest_a_pass_and_one_for_the_graph_all_different():
    assert len(set(digests())) == len(PASSES) + 1


def test_a_graph_that_is_made_without_any_pass_has_a_digest_too():
    assert len(digests(passes=[], exports=["onnx"], calibration={})) == 1


def test_a_recipe_that_begins_the_same_shares_what_it_begins_with():
    other = digests(passes=[PASSES[0], {"pass": "gptq", "bits": 8}])
    assert other[0] == digests()[0]
    assert other[1] != digests()[1]


@pytest.mark.parametrize(
    "changes", [{"name": "other"}, {"gates": {"size": "<= 50%"}}, {"evaluate": [{"metric": "latency"}]}]
)
def test_what_is_only_measured_or_said_changes_nothing(changes: dict[str, Any]):
    assert digests(**changes) == digests()


@pytest.mark.parametrize(
    "world",
    [
        {"tenant_id": "two"},
        {"model_digest": "sha256:9"},
        {"data": {"mine": "sha256:9"}},
        {"device": "cuda"},
        {"engine": "2"},
    ],
)
def test_whatever_decides_the_bytes_changes_every_digest(world: dict[str, Any]):
    assert not set(digests(world=world)) & set(digests())


@pytest.mark.parametrize("changes", [{"seed": 1}, {"calibration": {"data": "mine", "samples": 8}}])
def test_so_do_the_seed_and_the_calibration(changes: dict[str, Any]):
    assert not set(digests(**changes)) & set(digests())


def test_a_data_set_that_no_pass_reads_changes_nothing():
    assert digests(world={"data": {"mine": "sha256:2", "theirs": "sha256:9"}}) == digests()
    plain = {"passes": [{"pass": "magnitude"}], "exports": ["safetensors"]}
    assert digests(**plain, world={"data": {"mine": "sha256:9"}}) == digests(**plain)


def test_a_pass_is_done_only_if_all_its_files_are_there_and_it_was_made_of_the_same(tmp_path: Path):
    folder = tmp_path / pass_folder(0, "magnitude")
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"12345")
    header = ModelHeader(model_type="bert", architecture="BertModel", config={}, tensors=(), has_tokenizer=True)
    done = FinishedPass(made_of="a", files={"model.safetensors": 5}, header=header, records=())
    record = tmp_path / pass_record(0, "magnitude")
    record.write_text(done.model_dump_json())
    assert FinishedPass.load(tmp_path, 0, "magnitude", made_of="a") == done
    assert FinishedPass.load(tmp_path, 0, "magnitude", made_of="b") is None
    (folder / "model.safetensors").write_bytes(b"123")
    assert FinishedPass.load(tmp_path, 0, "magnitude", made_of="a") is None
    record.write_text("{")
    assert FinishedPass.load(tmp_path, 0, "magnitude", made_of="a") is None
