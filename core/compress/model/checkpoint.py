"""Reads the headers of safetensors files, and writes shards piece by piece. No tensor has to be in memory as a whole.

The format: 8 bytes with the header's length (little-endian), a JSON header, then the tensors' bytes without gaps.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from nightpress.core.disk import full_disk
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.header import TensorInfo

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
_TORCH: Mapping[str, str] = {"format": "pt"}  #: metadata that transformers expects of a file with torch's tensors
_MAX_HEADER = 100 * 1024**2

TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
SAFETENSORS_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a shard: its description, and the offset of its bytes in the file."""

    info: TensorInfo
    offset: int

    @property
    def name(self) -> str:
        return self.info.name


@dataclass(frozen=True)
class Shard:
    path: Path
    tensors: tuple[StoredTensor, ...]  #: in the order of their bytes
    metadata: dict[str, str]
    header: bytes  #: the JSON header as it is in the file


def read_shard(path: Path) -> Shard:
    """Read a file's header. Raises NightpressError(malformed_model) if it is unreadable or does not match the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _MAX_HEADER):
            raise _malformed(path, "its header is longer than the file")
        header = file.read(length)
    try:
        raw: dict[str, Any] = json.loads(header)
        metadata: dict[str, str] = raw.pop("__metadata__", {})
        tensors = [_stored(name, entry, 8 + length) for name, entry in raw.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _malformed(path, "its header can't be read") from error
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.info.size))
    end = 8 + length
    for tensor in tensors:
        if tensor.offset != end:
            raise _malformed(path, f"{tensor.name} overlaps its neighbour or leaves a hole")
        end += tensor.info.size
    if end != size:
        raise _malformed(path, f"its header describes {end:,} bytes and it has {size:,}")
    return Shard(path=path, tensors=tuple(tensors), metadata=metadata, header=header)


def read_shards(folder: Path) -> tuple[Shard, ...]:
    """Read the headers of all shards in a folder, sorted by file name. Raises NightpressError(malformed_model) if there is none."""
    shards = tuple(read_shard(path) for path in sorted(folder.glob("*.safetensors")))
    if not shards:
        raise NightpressError(
            ErrorCode.MALFORMED_MODEL, "The model has no safetensors file.", hint="Add model.safetensors."
        )
    return shards


def tensor_info(name: str, dtype: str, shape: tuple[int, ...]) -> TensorInfo:
    """Describe a tensor that will be written. dtype: its name in safetensors, e.g. `BF16`."""
    return TensorInfo(name=name, dtype=dtype, shape=shape, size=math.prod(shape) * TORCH_DTYPES[dtype].itemsize)


class ShardWriter:
    """Writes a shard: first the header, then the tensors' bytes in any order and from any thread.

    When `commit` returns, the complete file is on disk under its name. Without `commit`, it never gets this name.
    The constructor raises NightpressError(disk_full) if the disk can't hold the file.
    """

    def __init__(self, path: Path, tensors: Iterable[TensorInfo], metadata: Mapping[str, str] = _TORCH) -> None:
        self.path = path
        self._partial = path.with_name(path.name + ".partial")
        # Widest elements first, so that every tensor starts at a multiple of its element's size: readers map tensors in place.
        ordered = sorted(tensors, key=lambda tensor: -TORCH_DTYPES[tensor.dtype].itemsize)
        header, self.offsets, self.size = _layout(ordered, metadata)
        self.tensors = tuple(ordered)
        with disk_errors():
            self.file = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            try:
                os.posix_fallocate(self.file, 0, self.size)
                self.write_at(header, 0)
            except BaseException:
                self.abandon()
                raise

    def write(self, name: str, at: int, data: memoryview) -> None:
        """Write bytes into a tensor, at the offset `at` in bytes from its start."""
        with disk_errors():
            self.write_at(data, self.offsets[name] + at)

    def write_at(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        while len(view):
            written = os.pwrite(self.file, view, offset)
            view, offset = view[written:], offset + written

    def flush(self) -> None:
        """Wait until all data written so far is on disk. Regular calls make `commit` fast."""
        with disk_errors():
            os.fdatasync(self.file)

    def commit(self) -> None:
        """Wait until the file is on disk, and give it its name."""
        with disk_errors():
            os.fsync(self.file)
            os.close(self.file)
            self.file = -1
            self._partial.replace(self.path)
            sync_folder(self.path.parent)

    def abandon(self) -> None:
        """Delete the partial file. Does nothing after `commit`."""
        if self.file >= 0:
            os.close(self.file)
            self.file = -1
            self._partial.unlink(missing_ok=True)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abandon()


def write_tensors(
    path: Path, infos: Iterable[TensorInfo], tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str] = _TORCH
) -> None:
    """Write a complete file of named tensors. An iterator is read one tensor at a time. Raises the errors of `ShardWriter`."""
    with ShardWriter(path, infos, metadata) as writer:
        for name, tensor in tensors:
            writer.write(name, 0, tensor_bytes(tensor))
        writer.commit()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in the processor's memory, without a copy if it is contiguous."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # an array is a buffer


def write_index(folder: Path) -> None:
    """Write the index of all shards in a folder: which shard holds which tensor.

    Readers look for `model.safetensors` first, and it needs no index. Files with other names are found only through the index, even a
    single one. Raises NightpressError(malformed_model) if two shards hold the same tensor.
    """
    shards = read_shards(folder)
    if [shard.path.name for shard in shards] == [WEIGHTS_FILE]:
        return
    weight_map: dict[str, str] = {}
    for shard in shards:
        for stored in shard.tensors:
            if weight_map.setdefault(stored.name, shard.path.name) != shard.path.name:
                raise _malformed(shard.path, f"{stored.name} lies in {weight_map[stored.name]}, too")
    total = sum(stored.info.size for shard in shards for stored in shard.tensors)
    body = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX_FILE, body)


def write_file(path: Path, data: bytes) -> None:
    """Write a small file atomically, and wait until it is on disk."""
    partial = path.with_name(path.name + ".partial")
    with disk_errors():
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            sync_folder(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write a JSON file for people, as `write_file` does."""
    write_file(path, json.dumps(content, indent=2).encode() + b"\n")


def sync_folder(folder: Path) -> None:
    """Wait until a folder's entries are on disk: otherwise a power cut can undo a rename."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def disk_errors() -> contextlib.AbstractContextManager[None]:
    """In this context, an error of a full disk becomes NightpressError(disk_full)."""
    return full_disk(
        "The disk can't hold the pressed model",
        "Free space in the worker's data folder, or raise its limit on the size of a file.",
    )


def _stored(name: str, raw: Mapping[str, Any], data_start: int) -> StoredTensor:
    start, end = raw["data_offsets"]
    info = tensor_info(name, raw["dtype"], tuple(raw["shape"]))
    if not 0 <= start <= end or info.size != end - start:
        raise ValueError(name)
    return StoredTensor(info=info, offset=data_start + start)


def _layout(tensors: Iterable[TensorInfo], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """The header with its length, each tensor's offset in the file, and the file's size."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    starts: dict[str, int] = {}
    end = 0
    for tensor in tensors:
        starts[tensor.name] = end
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.size],
        }
        end += tensor.size
    body = json.dumps(entries, separators=(",", ":")).encode()
    body += b" " * (-len(body) % 8)
    header = len(body).to_bytes(8, "little") + body
    return header, {name: len(header) + start for name, start in starts.items()}, len(header) + end


def _malformed(path: Path, why: str) -> NightpressError:
    return NightpressError(
        ErrorCode.MALFORMED_MODEL,
        f"{path.name} is damaged: {why}.",
        hint="Fetch or export the model again.",
        file=path.name,
    )
