"""Checks that a model's stored weights are finite."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nightpress.core.compress.model.checkpoint import Shard, read_shards
from nightpress.core.errors import ErrorCode, NightpressError

#: safetensors dtype → unsigned type of the same width, and the mask of the exponent's bits: only ±∞ and NaN have all of them set
_EXPONENTS: dict[str, tuple[str, int]] = {
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F32": ("<u4", 0x7F800000),
    "F64": ("<u8", 0x7FF0000000000000),
}
_CHUNK = 2**20  #: bytes that a thread holds: they stay in its processor's cache
_PIECE = 64 * _CHUNK  #: bytes of a thread's turn


@dataclass(frozen=True)
class _Piece:
    """Some bytes of a tensor in a file."""

    tensor: str
    dtype: str
    path: Path
    start: int
    end: int


def check_weights(folder: Path, threads: int = 1) -> None:
    """Raises NightpressError(numerical_failure) that names the tensors with NaN or infinities: they would make every figure useless.

    threads: those that read. One thread reads 2 to 3 GB/s, less than memory gives.
    """
    pieces = [piece for shard in read_shards(folder) for piece in _pieces(shard)]
    with ThreadPoolExecutor(threads) as readers:
        finite = list(readers.map(_is_finite, pieces))
    bad = list(dict.fromkeys(piece.tensor for piece, sound in zip(pieces, finite, strict=True) if not sound))
    if bad:
        names = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise NightpressError(
            ErrorCode.NUMERICAL_FAILURE,
            f"The source model's weights are not all finite: {names}.",
            hint="The model is damaged, or its training diverged: bring a sound one.",
            tensors=bad[:100],
        )


def _pieces(shard: Shard) -> Iterator[_Piece]:
    for stored in shard.tensors:
        if stored.info.dtype in _EXPONENTS:
            end = stored.offset + stored.info.size
            for start in range(stored.offset, end, _PIECE):
                yield _Piece(stored.name, stored.info.dtype, shard.path, start, min(start + _PIECE, end))


def _is_finite(piece: _Piece) -> bool:
    dtype, mask = _EXPONENTS[piece.dtype]
    held = bytearray(_CHUNK)
    with piece.path.open("rb", buffering=0) as file:
        for start in range(piece.start, piece.end, _CHUNK):
            wanted = memoryview(held)[: min(_CHUNK, piece.end - start)]
            if os.preadv(file.fileno(), [wanted], start) != len(wanted):
                raise OSError(f"{piece.path.name} ends before byte {piece.end:,}")
            bits = np.frombuffer(wanted, dtype)
            exponent = bits.dtype.type(mask)
            if (bits & exponent).max() == exponent:
                return False
    return True
