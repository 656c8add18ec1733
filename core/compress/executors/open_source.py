"""Opens a source that is stored as codes: writes the float model that the codes stand for, in chunks of rows."""

import json
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from nightpress.core.compress.executors.rewrite import tensor_bytes
from nightpress.core.compress.grids.stored_weights import decode_rows, row_step
from nightpress.core.compress.model.checkpoint import (
    TORCH_DTYPES,
    Shard,
    ShardWriter,
    disk_errors,
    read_shards,
    write_index,
)
from nightpress.core.compress.model.companions import copy_companions, forget_quantization, link_or_copy
from nightpress.core.compress.model.source import SourceTensors
from nightpress.core.recipes.header import TensorInfo
from nightpress.core.recipes.stored_forms import FloatView, StoredWeight, float_view

_CHUNK = 32 * 1024**2  #: bytes of float32 that are decoded at a time

Progress = Callable[[float, str], None]  #: (fraction, what is done now)


def open_source(source: Path, target: Path, progress: Progress) -> FloatView:
    """Write the model of `source` to `target` as floats, without a `quantization_config`. Returns what it was stored as.

    A model of floats whose config names a quantization is linked, not copied. Peak memory: the stored form of one weight, and a chunk of
    floats. Raises NightpressError(malformed_model, unsupported_format, disk_full).
    """
    shards = read_shards(source)
    tensors = SourceTensors(shards)
    infos = [stored.info for shard in shards for stored in shard.tensors]
    config = json.loads((source / "config.json").read_bytes())
    view = float_view(config, infos, lambda name: bytes(tensor_bytes(tensors.read(name))))
    if view is None:
        raise ValueError(f"{source} is not quantized")
    with disk_errors():
        target.mkdir(parents=True, exist_ok=True)
    copy_companions(source, target)
    forget_quantization(target)
    infos_of = {info.name: info for info in view.tensors}
    total, done = sum(info.size for info in view.tensors), 0
    for shard in shards:
        outputs = _outputs(shard, view, infos_of)
        if not view.weights:
            link_or_copy(str(shard.path), str(target / shard.path.name))
        elif outputs:
            with ShardWriter(target / shard.path.name, outputs, shard.metadata or {"format": "pt"}) as writer:
                for info in outputs:
                    _write(info, view.weights.get(info.name), tensors, writer)
                    done += info.size
                    progress(done / max(total, 1), info.name)
                writer.commit()
    write_index(target)
    return view


def _outputs(shard: Shard, view: FloatView, infos: dict[str, TensorInfo]) -> list[TensorInfo]:
    """The float tensors that replace a shard's tensors. A weight is written to the shard that holds its codes."""
    weights = {weight.parts["codes"]: weight.name for weight in view.weights.values()}
    names = (weights.get(stored.name, stored.name) for stored in shard.tensors)
    return [infos[name] for name in names if name in infos]


def _write(info: TensorInfo, weight: StoredWeight | None, tensors: SourceTensors, writer: ShardWriter) -> None:
    if weight is None:
        for at, piece in tensors.pieces(info.name):
            writer.write(info.name, at, piece)
        return
    parts, dtype = _StoredParts(weight, tensors), TORCH_DTYPES[info.dtype]
    columns = info.shape[-1]
    rows, step = info.size // (columns * dtype.itemsize), row_step(weight)
    chunk = max(_CHUNK // (4 * columns) // step, 1) * step
    for first in range(0, rows, chunk):
        floats = decode_rows(weight, parts, first, min(chunk, rows - first))
        writer.write(info.name, first * columns * dtype.itemsize, tensor_bytes(floats.to(dtype).contiguous()))


class _StoredParts:
    """The tensors of a weight, read from the files on request."""

    def __init__(self, weight: StoredWeight, tensors: SourceTensors) -> None:
        self._names = weight.parts
        self._tensors = tensors
        self._whole: dict[str, Tensor] = {}

    def whole(self, role: str) -> Tensor | None:
        if role in self._names and role not in self._whole:
            self._whole[role] = self._tensors.read(self._names[role])
        return self._whole.get(role)

    def rows(self, role: str, first: int, count: int) -> Tensor:
        return self._tensors.read_rows(self._names[role], first, count)
