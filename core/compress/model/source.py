"""Reads the tensors of a model's files by name."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from nightpress.core.compress.model.checkpoint import TORCH_DTYPES, Shard, StoredTensor, read_shards
from nightpress.core.errors import ErrorCode, NightpressError

_PIECE = 16 * 1024**2  #: bytes copied at a time


class SourceTensors:
    """The tensors of all shards by name. They are read from the files on request."""

    def __init__(self, shards: tuple[Shard, ...]) -> None:
        self.shards = shards
        self._places = {stored.name: (shard, stored) for shard in self.shards for stored in shard.tensors}

    @classmethod
    def in_folder(cls, folder: Path) -> "SourceTensors":
        """The tensors of a model's folder. Raises the errors of `read_shards`."""
        return cls(read_shards(folder))

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def names(self) -> list[str]:
        return list(self._places)

    def stored(self, name: str) -> StoredTensor:
        return self._places[name][1]

    def read(self, name: str) -> Tensor:
        """Read a tensor into newly allocated memory. Raises NightpressError(malformed_model) if the file has become shorter."""
        shard, stored = self._places[name]
        data = torch.empty(stored.info.size, dtype=torch.uint8)
        _read(shard, stored.offset, memoryview(data.numpy()))  # type: ignore[arg-type]
        return data.view(TORCH_DTYPES[stored.info.dtype]).view(stored.info.shape)

    def read_rows(self, name: str, first: int, count: int) -> Tensor:
        """Read rows of a tensor, seen as a matrix whose rows are its last dimension: [count, last]."""
        shard, stored = self._places[name]
        columns = stored.info.shape[-1]
        dtype = TORCH_DTYPES[stored.info.dtype]
        width = columns * dtype.itemsize
        if first < 0 or (first + count) * width > stored.info.size:
            raise ValueError(f"{name} has no rows {first} to {first + count}")
        data = torch.empty(count * width, dtype=torch.uint8)
        _read(shard, stored.offset + first * width, memoryview(data.numpy()))  # type: ignore[arg-type]
        return data.view(dtype).view(count, columns)

    def will_need(self, names: Iterable[str]) -> None:
        """Ask the kernel to read these tensors into its cache."""
        for name in names:
            shard, stored = self._places[name]
            with shard.path.open("rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), stored.offset, stored.info.size, os.POSIX_FADV_WILLNEED)

    def pieces(self, name: str) -> Iterator[tuple[int, memoryview]]:
        """The tensor's bytes in pieces of at most 16 MiB: (offset in the tensor, bytes). The next piece overwrites the buffer."""
        shard, stored = self._places[name]
        room = memoryview(bytearray(min(_PIECE, stored.info.size)))
        for at in range(0, stored.info.size, _PIECE):
            piece = room[: stored.info.size - at]
            _read(shard, stored.offset + at, piece)
            yield at, piece


def _read(shard: Shard, offset: int, into: memoryview) -> None:
    with shard.path.open("rb", buffering=0) as file:
        file.seek(offset)
        while len(into):
            count = file.readinto(into)
            if not count:
                raise NightpressError(
                    ErrorCode.MALFORMED_MODEL,
                    f"{shard.path.name} became shorter while it was read.",
                    hint="Leave the model's files alone while a job runs.",
                )
            into = into[count:]
