"""Folders of safetensors, read by range and written shard by shard. No tensor is ever held whole.

The format: 8 bytes of header length (little-endian), a JSON header, then the tensors' bytes without holes.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from nightpress.core.disk import full_disk
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.header import TensorInfo

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
_MAX_HEADER = 100 * 1024**2

TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
SAFETENSORS_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a shard: what it is, and where its bytes begin in the file."""

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
    header: bytes  #: as it stands in the file


def read_shard(path: Path) -> Shard:
    """Read a file's header. Raises NightpressError(malformed_model) where it and the file don't agree."""
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
    """The shards of a model's folder, by name. Raises NightpressError(malformed_model) if there is none."""
    shards = tuple(read_shard(path) for path in sorted(folder.glob("*.safetensors")))
    if not shards:
        raise NightpressError(
            ErrorCode.MALFORMED_MODEL, "The model has no safetensors file.", hint="Add model.safetensors."
        )
    return shards


def tensor_info(name: str, dtype: str, shape: tuple[int, ...]) -> TensorInfo:
    """Describe a tensor that is yet to be written."""
    return TensorInfo(name=name, dtype=dtype, shape=shape, size=math.prod(shape) * TORCH_DTYPES[dtype].itemsize)


class ShardWriter:
    """A shard under way: its header is written first, then any bytes in any order, by any thread.

    The file appears under its own name, whole and on disk, when `commit` returns, and not at all otherwise.
    Raises NightpressError(disk_full) at once if the disk can't hold it.
    """

    def __init__(self, path: Path, tensors: Iterable[TensorInfo], metadata: Mapping[str, str]) -> None:
        self.path = path
        self._partial = path.with_name(path.name + ".partial")
        # Widest first, so that every tensor starts at a multiple of its element's size; readers map them in place.
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
        """Put bytes `at` bytes into a tensor."""
        with disk_errors():
            self.write_at(data, self.offsets[name] + at)

    def write_at(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        while len(view):
            written = os.pwrite(self.file, view, offset)
            view, offset = view[written:], offset + written

    def flush(self) -> None:
        """Wait until what has been written so far is on disk. Called early and often, it leaves little for `commit`."""
        with disk_errors():
            os.fdatasync(self.file)

    def commit(self) -> None:
        """Put the file on disk under its name."""
        with disk_errors():
            os.fsync(self.file)
            os.close(self.file)
            self.file = -1
            self._partial.replace(self.path)
            sync_folder(self.path.parent)

    def abandon(self) -> None:
        """Leave nothing behind. Does nothing after `commit`."""
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


def write_index(folder: Path) -> None:
    """Finish a checkpoint: write which shard holds which tensor, as the shards in the folder say.

    Readers look for `model.safetensors` first and need no index for it. Weights under any other name are found by the index alone, even
    where they are one file. Raises NightpressError(malformed_model) if a tensor lies in two shards.
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
    write_file(folder / INDEX_FILE, json.dumps(body, indent=2).encode() + b"\n")


def write_file(path: Path, data: bytes) -> None:
    """Write a small file so that it is there whole, on disk, or not at all."""
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


def sync_folder(folder: Path) -> None:
    """Put a folder's names on disk: a rename outlives a power cut only then."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def disk_errors() -> contextlib.AbstractContextManager[None]:
    """Raise NightpressError(disk_full) where the disk takes no more."""
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
    """The header with its length, where each tensor starts in the file, and the file's size."""
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
