"""Safetensors read by range and written in pieces, compared with the library; and errors of disks and files."""

import json
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nightpress.core.compress.model.checkpoint import (
    INDEX_FILE,
    ShardWriter,
    read_shard,
    read_shards,
    tensor_bytes,
    tensor_info,
    write_index,
)
from nightpress.core.errors import ErrorCode, NightpressError

TENSORS = {
    "b": torch.arange(3, dtype=torch.bfloat16),  # 6 bytes: the next tensor would be misaligned
    "a.weight": torch.randn(4, 5),
    "shape": torch.tensor([4, 5]),
    "flags": torch.tensor([True, False, True]),
    "half": torch.ones(3, 3, dtype=torch.float16),
    "nothing": torch.zeros(0, 4),
}
NAMES = {
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.int64: "I64",
    torch.bool: "BOOL",
    torch.float16: "F16",
}


def written(path: Path) -> Path:
    infos = [tensor_info(name, NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in TENSORS.items()]
    with ShardWriter(path, infos, {"format": "pt"}) as writer:
        for name, tensor in reversed(TENSORS.items()):  # in any order
            data = tensor_bytes(tensor)
            writer.write(name, len(data) // 2, data[len(data) // 2 :])  # and in pieces
            writer.write(name, 0, data[: len(data) // 2])
        writer.commit()
    return path


def test_the_library_reads_what_was_written_in_pieces(tmp_path: Path):
    path = written(tmp_path / "model.safetensors")
    for name, tensor in load_file(path).items():
        assert torch.equal(tensor, TENSORS[name])
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_every_tensor_starts_at_a_multiple_of_its_elements(tmp_path: Path):
    for tensor in read_shard(written(tmp_path / "model.safetensors")).tensors:
        assert tensor.offset % TENSORS[tensor.name].element_size() == 0


def test_it_reads_what_the_library_wrote(tmp_path: Path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (shard,) = read_shards(tmp_path)
    assert shard.metadata == {"format": "pt"}
    raw = shard.path.read_bytes()
    for tensor in shard.tensors:
        assert raw[tensor.offset : tensor.offset + tensor.info.size] == bytes(tensor_bytes(TENSORS[tensor.name]))


def test_a_file_does_not_appear_until_it_is_whole(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    with ShardWriter(path, [tensor_info("a", "F32", (4,))], {}) as writer:
        writer.write("a", 0, tensor_bytes(torch.ones(4)))
        writer.flush()
        assert not path.exists()
        writer.commit()
    assert [path.name for path in tmp_path.iterdir()] == [path.name]


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path):
    with (
        pytest.raises(RuntimeError, match="half way"),
        ShardWriter(tmp_path / "model.safetensors", [tensor_info("a", "F32", (4,))], {}),
    ):
        raise RuntimeError("half way")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may be longer than 64 KiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_files")
def test_a_disk_that_cannot_hold_the_file_is_found_before_anything_is_computed(tmp_path: Path):
    with pytest.raises(NightpressError) as caught:
        ShardWriter(tmp_path / "model.safetensors", [tensor_info("a", "F32", (1024, 1024))], {})
    assert caught.value.code is ErrorCode.DISK_FULL
    assert list(tmp_path.iterdir()) == []


def damaged(raw: bytes, how: str) -> bytes:
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    match how:
        case "truncated":
            return raw[:-1]
        case "longer":
            return raw + b"\0"
        case "header beyond the end":
            return (2**62).to_bytes(8, "little") + raw[8:]
        case "no JSON":
            return raw[:8] + b"x" * length + raw[8 + length :]
        case "a list":
            body = b"[]"
            return len(body).to_bytes(8, "little") + body
        case "shape and bytes differ":
            header["a"]["shape"] = [5]
        case "unknown dtype":
            header["a"]["dtype"] = "F3"
        case "overlap":
            header["b"]["data_offsets"] = [8, 24]
        case "negative":
            header["a"]["data_offsets"] = [-16, 0]
        case "empty":
            return b""
    body = json.dumps(header).encode()
    return len(body).to_bytes(8, "little") + body + raw[8 + length :]


@pytest.mark.parametrize(
    "how",
    [
        "truncated",
        "longer",
        "header beyond the end",
        "no JSON",
        "a list",
        "shape and bytes differ",
        "unknown dtype",
        "overlap",
        "negative",
        "empty",
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, how: str):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4), "b": torch.ones(4)}, path)
    path.write_bytes(damaged(path.read_bytes(), how))
    with pytest.raises(NightpressError) as caught:
        read_shard(path)
    assert caught.value.code is ErrorCode.MALFORMED_MODEL
    assert caught.value.details["file"] == path.name


def test_a_folder_without_safetensors_is_refused(tmp_path: Path):
    with pytest.raises(NightpressError) as caught:
        read_shards(tmp_path)
    assert caught.value.code is ErrorCode.MALFORMED_MODEL


def test_an_index_is_sorted_and_adds_up(tmp_path: Path):
    save_file({"b": torch.zeros(2)}, tmp_path / "model-1.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "model-2.safetensors")
    write_index(tmp_path)
    index = json.loads((tmp_path / INDEX_FILE).read_bytes())
    assert list(index["weight_map"].items()) == [("a", "model-2.safetensors"), ("b", "model-1.safetensors")]
    assert index["metadata"]["total_size"] == 12


@pytest.mark.parametrize(("name", "wanted"), [("model.safetensors", False), ("model-00001-of-00001.safetensors", True)])
def test_only_the_file_that_readers_look_for_first_needs_no_index(name: str, wanted: bool, tmp_path: Path):
    save_file({"a": torch.zeros(1)}, tmp_path / name)
    write_index(tmp_path)
    assert (tmp_path / INDEX_FILE).exists() is wanted


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path):
    for name in ("model-1.safetensors", "model-2.safetensors"):
        save_file({"a": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(NightpressError, match="a lies in model-1"):
        write_index(tmp_path)
