"""Models whose files are links, as in the Hub's cache: which links are followed, and which are refused."""

import shutil
from pathlib import Path

import pytest

from nightpress.client.folders import read_model_folder
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from tests.hub_cache import hub_snapshot


def test_a_snapshot_of_the_hubs_cache_reads_as_the_folder_it_stands_for(bert_tiny: Path, tmp_path: Path) -> None:
    snapshot = hub_snapshot(bert_tiny, tmp_path)
    files = FolderFiles(snapshot)
    assert files.names() == FolderFiles(bert_tiny).names()
    assert inspect_model(files) == inspect_model(FolderFiles(bert_tiny))
    assert files.path("config.json").parent.name == "blobs"


@pytest.mark.parametrize(
    ("target", "code"),
    [
        ("../../refs/main", ErrorCode.PATH_NOT_ALLOWED),
        ("../other/secret.json", ErrorCode.PATH_NOT_ALLOWED),
        ("../../blobs/../../secret.json", ErrorCode.PATH_NOT_ALLOWED),
        ("../../blobs", ErrorCode.PATH_NOT_ALLOWED),
        ("../../blobs/leads-out", ErrorCode.PATH_NOT_ALLOWED),
        ("vocab.json", ErrorCode.PATH_NOT_ALLOWED),
        ("../../blobs/gone", ErrorCode.NOT_FOUND),
    ],
)
def test_a_snapshots_link_leads_to_a_blob_or_nowhere(
    bert_tiny: Path, tmp_path: Path, target: str, code: ErrorCode
) -> None:
    snapshot = hub_snapshot(bert_tiny, tmp_path)
    (tmp_path / "secret.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    (snapshot.parent / "other").mkdir()
    (snapshot.parent / "other" / "secret.json").write_text("{}")
    (snapshot.parents[1] / "blobs" / "leads-out").symlink_to(tmp_path / "secret.json")
    (snapshot / "vocab.json").symlink_to(target)
    with pytest.raises(NightpressError) as error:
        FolderFiles(snapshot).names()
    assert error.value.code is code
    assert error.value.details["file"] == "vocab.json"
    assert error.value.hint


def test_blobs_beside_a_folder_that_is_no_snapshot_are_not_its_own(bert_tiny: Path, tmp_path: Path) -> None:
    snapshot = hub_snapshot(bert_tiny, tmp_path)
    snapshot.parent.rename(snapshot.parents[1] / "models")
    with pytest.raises(NightpressError, match="leads out of its folder"):
        FolderFiles(snapshot.parents[1] / "models" / snapshot.name).names()


def test_a_blobs_folder_that_is_a_link_is_not_followed(bert_tiny: Path, tmp_path: Path) -> None:
    snapshot = hub_snapshot(bert_tiny, tmp_path)
    blobs = snapshot.parents[1] / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(NightpressError, match="leads out of its folder"):
        FolderFiles(snapshot).names()


def test_a_client_sends_what_links_stand_for_and_the_modules_below(bert_tiny: Path, tmp_path: Path) -> None:
    snapshot = hub_snapshot(bert_tiny, tmp_path)
    (snapshot / "1_Pooling").mkdir()
    (snapshot / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    (snapshot / "checkpoint-5").mkdir()
    (snapshot / "checkpoint-5" / "optimizer.pt").touch()
    (snapshot / "training_args.bin").touch()
    chosen = read_model_folder(snapshot)
    assert chosen.files.keys() == {*FolderFiles(bert_tiny).names(), "1_Pooling/config.json"}
    assert not any(path.is_symlink() for path in chosen.files.values())
    assert chosen.left_out == ("checkpoint-5/", "training_args.bin")
    (snapshot / "merges.txt").symlink_to(tmp_path / "outside.txt")
    with pytest.raises(NightpressError, match=r"merges\.txt leads out of its folder"):
        read_model_folder(snapshot)


def test_a_link_that_is_not_needed_is_not_followed(bert_tiny: Path, tmp_path: Path) -> None:
    snapshot = hub_snapshot(bert_tiny, tmp_path)
    (tmp_path / "secret.py").write_text("secret")
    (snapshot / "run.py").symlink_to(tmp_path / "secret.py")
    (snapshot / "elsewhere").symlink_to(tmp_path)
    (snapshot / "loop").symlink_to("loop")
    assert FolderFiles(snapshot).selection().left_out == ("elsewhere/", "loop", "run.py")


@pytest.mark.parametrize("exchanged", ["file", "folder"])
def test_a_link_that_is_exchanged_while_it_is_opened_is_not_followed(
    bert_tiny: Path, tmp_path: Path, exchanged: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process exchanges the file, or the folder that it is in, after the check and before the opening."""
    folder, outside = tmp_path / "model", tmp_path / "outside"
    shutil.copytree(bert_tiny, folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    outside.mkdir()
    (outside / "config.json").write_text("secret")
    files = FolderFiles(folder)
    check = files._checked

    def check_then_exchange(name: str) -> tuple[Path, Path]:
        found = check(name)
        if exchanged == "file":
            (folder / name).unlink()
            (folder / name).symlink_to(outside / "config.json")
        else:
            shutil.rmtree(folder / "1_Pooling")
            (folder / "1_Pooling").symlink_to(outside)
        return found

    monkeypatch.setattr(files, "_checked", check_then_exchange)
    with pytest.raises(NightpressError) as error:
        files.read("1_Pooling/config.json", 0, 100)
    assert error.value.code is ErrorCode.PATH_NOT_ALLOWED
