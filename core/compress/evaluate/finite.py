"""Checks that a model's stored weights are finite."""

import mmap
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
_CHUNK = 2**20


def check_weights(folder: Path) -> None:
    """Raises NightpressError(numerical_failure) that names the tensors with NaN or infinities: they would make every figure useless."""
    bad = [name for shard in read_shards(folder) for name in _not_finite(shard)]
    if bad:
        names = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise NightpressError(
            ErrorCode.NUMERICAL_FAILURE,
            f"The source model's weights are not all finite: {names}.",
            hint="The model is damaged, or its training diverged: bring a sound one.",
            tensors=bad[:100],
        )


def _not_finite(shard: Shard) -> list[str]:
    found = []
    with shard.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for stored in shard.tensors:
            if stored.info.dtype not in _EXPONENTS or not stored.info.size:
                continue
            dtype, exponent = _EXPONENTS[stored.info.dtype]
            step = _CHUNK * np.dtype(dtype).itemsize
            end = stored.offset + stored.info.size
            for start in range(stored.offset, end, step):
                bits = np.frombuffer(data[start : min(start + step, end)], dtype)
                if ((bits & bits.dtype.type(exponent)) == exponent).any():
                    found.append(stored.name)
                    break
    return found
