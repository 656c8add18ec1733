"""Deliveries to a repository of the Hub: one commit, whatever breaks, that `huggingface_hub` reads and Nightpress verifies."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nightpress.core.handoff.attestation import read_public_keys
from nightpress.core.handoff.manifest import ATTESTATION_FILE
from nightpress.core.handoff.verification import verify_folder
from tests.databases import migrated_sqlite
from tests.deliveries import FILES, TENANT, World, large_files
from tests.hub import Hub, serve_hub

REPOSITORY = "models/acme/tiny-int8"
DELIVERED = FILES.keys() | {"README.md", "report.html", "report.json", ATTESTATION_FILE}
MIB = 1024**2

#: What a user of the library does with a delivered repository.
READER = """
import json, sys
from huggingface_hub import ModelCard, snapshot_download
folder = snapshot_download("acme/tiny-int8", endpoint=sys.argv[1], cache_dir=sys.argv[2])
card = ModelCard.load(folder + "/README.md")
found = [[result.metric_type, result.metric_value, result.dataset_name] for result in card.data.eval_results]
print(json.dumps({"folder": folder, "results": found, "tags": card.data.tags}))
"""
#: The library's own commit, with a large and a small file.
WRITER = """
import sys
from huggingface_hub import CommitOperationAdd, HfApi
api = HfApi(endpoint=sys.argv[1], token="t")
api.create_repo("acme/by-library")
files = {"model.safetensors": bytes(3_000_000), "config.json": b"{}"}
api.create_commit("acme/by-library", [CommitOperationAdd(path, data) for path, data in files.items()], commit_message="theirs")
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve_hub() as hub:
        hub.writes.tokens = {"hf_right"}
        yield hub


@pytest.fixture
def world(tmp_path: Path, hub: Hub) -> Iterator[World]:
    world = World(
        tmp_path, migrated_sqlite(tmp_path / "nightpress.db"), destinations=["hf://Acme"], hub_endpoint=hub.url
    )
    world.credentials("hf://acme", token="hf_right")
    yield world
    world.close()


def with_the_library(program: str, *arguments: str) -> str:
    env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", program, *arguments], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.slow
def test_a_commit_that_the_library_reads_and_that_verifies(world: World, hub: Hub, tmp_path: Path) -> None:
    world.accept(destinations=["hf://acme/{model}-int8@main"])
    done = world.run()
    assert (done.state, done.error) == ("delivered", None)
    assert done.result is not None
    assert done.result["commit"] == hub.branches[REPOSITORY, "main"]
    [commit] = hub.writes.commits
    assert commit["summary"] == "tiny pressed with test: onnx"
    assert done.id in commit["description"]
    said = json.loads(with_the_library(READER, hub.url, str(tmp_path / "cache")))
    folder = Path(said["folder"])
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {
        ".gitattributes"
    } == DELIVERED
    report = json.loads((folder / "report.json").read_text())
    measured = [
        [figure["name"], round(figure["value"], 6), figure["data"]] for figure in report["artifacts"][0]["measurements"]
    ]
    assert [result[1:] for result in said["results"]] == [figure[1:] for figure in measured]
    assert "nightpress" in said["tags"]
    pem = world.resources.signing.public_keys()[0].public_key.encode()
    [verified] = verify_folder(folder, read_public_keys(pem))
    assert verified.faults == ()


@pytest.mark.slow
def test_the_library_itself_writes_to_the_imitation(hub: Hub) -> None:
    hub.writes.tokens = set()
    hub.writes.chunk_size = MIB
    with_the_library(WRITER.replace('"acme/by-library")\n', '"acme/by-library", exist_ok=True)\n', 1), hub.url)
    files = hub.repositories["models/acme/by-library"][hub.branches["models/acme/by-library", "main"]]
    assert files.keys() - {".gitattributes"} == {"model.safetensors", "config.json"}
    assert len(files["model.safetensors"]) == 3_000_000


def test_a_commit_whose_answer_was_lost_is_not_made_twice(world: World, hub: Hub) -> None:
    world.accept(destinations=["hf://acme/tiny-int8@nightly"])
    hub.writes.lose_answer = True
    lost = world.run()
    assert (lost.state, lost.error and lost.error["code"]) == ("pending", "destination_unavailable")
    world.store.retry(TENANT, lost.id)
    done = world.run()
    assert done.state == "delivered"
    [commit] = hub.writes.commits
    assert (commit["oid"], commit["branch"]) == ((done.result or {})["commit"], "nightly")
    assert "model.onnx" not in hub.repositories[REPOSITORY][hub.branches[REPOSITORY, "main"]]


@pytest.mark.slow
def test_a_file_in_parts_goes_on_where_it_broke_off(world: World, hub: Hub) -> None:
    hub.writes.chunk_size = MIB
    files = large_files(6 * MIB)
    world.accept({"onnx": files}, destinations=["hf://acme/tiny-int8"])
    hub.writes.interrupt = lambda path: path.startswith("lfs/part") and path.endswith("/5")
    broken = world.run()
    assert (broken.state, hub.writes.received) == ("pending", 4 * MIB)
    hub.writes.interrupt = None
    world.store.retry(TENANT, broken.id)
    assert world.run().state == "delivered"
    assert hub.writes.received == 6 * MIB
    assert hub.repositories[REPOSITORY][hub.branches[REPOSITORY, "main"]]["model.onnx"] == files["model.onnx"]


@pytest.mark.slow
def test_an_open_upload_that_expired_begins_anew(world: World, hub: Hub) -> None:
    hub.writes.chunk_size = MIB
    world.accept({"onnx": large_files(3 * MIB)}, destinations=["hf://acme/tiny-int8"])
    hub.writes.interrupt = lambda path: path.endswith("/3")
    broken = world.run()
    hub.writes.interrupt = None
    hub.writes.parts.clear()
    world.store.retry(TENANT, broken.id)
    assert world.run().state == "pending"
    world.store.retry(TENANT, broken.id)
    assert world.run().state == "delivered"


@pytest.mark.slow
def test_the_next_result_takes_the_place_and_leaves_other_files(world: World, hub: Hub) -> None:
    hub.push(REPOSITORY, {"notes.txt": b"mine", ".gitattributes": b""})
    world.accept({"onnx": {**FILES, "old.txt": b"old"}}, destinations=["hf://acme/tiny-int8"])
    assert world.run().state == "delivered"
    received = hub.writes.received
    world.accept(destinations=["hf://acme/tiny-int8"])
    assert world.run().state == "delivered"
    files = hub.repositories[REPOSITORY][hub.branches[REPOSITORY, "main"]]
    assert files.keys() == DELIVERED | {"notes.txt", ".gitattributes"}
    assert hub.writes.received == received  # the weights are the same: the Hub has them


def test_a_token_that_may_not_write_fails_at_once(world: World, hub: Hub) -> None:
    hub.writes.tokens = {"another"}
    world.accept(destinations=["hf://acme/tiny-int8"])
    failed = world.run()
    assert (failed.state, failed.error and failed.error["code"]) == ("failed", "destination_refused")
    assert "hf_right" not in str(failed)
    assert hub.repositories == {}


def test_a_hub_in_a_network_that_is_not_allowed_is_not_reached(tmp_path: Path, hub: Hub) -> None:
    world = World(
        tmp_path,
        migrated_sqlite(tmp_path / "nightpress.db"),
        destinations=["hf://acme"],
        hub_endpoint=hub.url,
        destination_networks=[],
    )
    world.credentials("hf://acme", token="hf_right")
    world.accept(destinations=["hf://acme/tiny-int8"])
    tried = world.run()
    assert tried.error is not None
    assert "private or reserved" in tried.error["message"]
    assert hub.asked == []
    world.close()
