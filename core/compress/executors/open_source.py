"""Opens a source that is not stored as plain floats: decodes its codes and merges its adapter, in chunks of rows."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from nightpress.core.compress.grids.stored_weights import decode_rows, row_step
from nightpress.core.compress.model.checkpoint import (
    TORCH_DTYPES,
    Shard,
    ShardWriter,
    disk_errors,
    read_shards,
    tensor_bytes,
    tensor_info,
    write_index,
    write_json,
)
from nightpress.core.compress.model.companions import copy_companions, forget_quantization, link_or_copy
from nightpress.core.compress.model.merging import Merger
from nightpress.core.compress.model.source import SourceTensors
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.adapters import ADAPTER_DIR, Adapter, adapter_files, read_adapter
from nightpress.core.recipes.filenames import ADAPTER_FILE, ADAPTER_WEIGHTS
from nightpress.core.recipes.header import TensorInfo
from nightpress.core.recipes.jsonfile import parse_json
from nightpress.core.recipes.stored_forms import FloatView, StoredWeight, float_view

_CHUNK = 32 * 1024**2  #: bytes of float32 that are decoded at a time

Progress = Callable[[float, str], None]  #: (fraction, what is done now)


@dataclass(frozen=True)
class Opened:
    """What a source was stored as."""

    view: FloatView
    adapter: Adapter | None


def open_source(source: Path, target: Path, progress: Progress, *, adapter: Path | None = None) -> Opened:
    """Write the model of `source` to `target` as floats, with the adapter merged, and without a `quantization_config`.

    Shards that stay as they are become links. Peak memory: the stored form of one weight, and a chunk
    of floats. Raises NightpressError(malformed_model, unsupported_format, disk_full).
    """
    shards = read_shards(source)
    tensors = SourceTensors(shards)
    view = _view_of(source, shards, tensors)
    merging = None if adapter is None else _Merging(adapter, view)
    with disk_errors():
        target.mkdir(parents=True, exist_ok=True)
    copy_companions(source, target)
    shutil.rmtree(target / ADAPTER_DIR, ignore_errors=True)
    forget_quantization(target)
    infos = {info.name: info for info in view.tensors}
    if merging is not None:
        infos |= merging.grown(infos)
        merging.copy_tokenizer(target)
        merging.resize_vocabulary(target)
    total, done = sum(info.size for info in infos.values()), 0
    for shard in shards:
        outputs = _outputs(shard, view, infos)
        if outputs == [stored.info for stored in shard.tensors] and not _changes(outputs, merging):
            link_or_copy(str(shard.path), str(target / shard.path.name))
        elif outputs:
            with ShardWriter(target / shard.path.name, outputs, shard.metadata or {"format": "pt"}) as writer:
                for info in outputs:
                    merger = merging.of(info.name) if merging is not None else None
                    _write(info, view.weights.get(info.name), merger, tensors, writer)
                    done += info.size
                    progress(done / max(total, 1), info.name)
                writer.commit()
    write_index(target)
    return Opened(view, None if merging is None else merging.adapter)


def _view_of(source: Path, shards: tuple[Shard, ...], tensors: SourceTensors) -> FloatView:
    infos = [stored.info for shard in shards for stored in shard.tensors]
    config = json.loads((source / "config.json").read_bytes())
    view = float_view(config, infos, lambda name: bytes(tensor_bytes(tensors.read(name))))
    return view or FloatView(tuple(infos), {}, None)


def _outputs(shard: Shard, view: FloatView, infos: dict[str, TensorInfo]) -> list[TensorInfo]:
    """The float tensors that replace a shard's tensors. A weight is written to the shard that holds its codes."""
    weights = {weight.parts["codes"]: weight.name for weight in view.weights.values()}
    names = (weights.get(stored.name, stored.name) for stored in shard.tensors)
    return [infos[name] for name in names if name in infos]


def _changes(outputs: list[TensorInfo], merging: "_Merging | None") -> bool:
    return merging is not None and any(info.name in merging.adapter.merges for info in outputs)


def _write(
    info: TensorInfo, weight: StoredWeight | None, merger: Merger | None, tensors: SourceTensors, writer: ShardWriter
) -> None:
    if not info.size:
        return
    if weight is None and merger is None:
        for at, piece in tensors.pieces(info.name):
            writer.write(info.name, at, piece)
        return
    parts, dtype = None if weight is None else _StoredParts(weight, tensors), TORCH_DTYPES[info.dtype]
    columns = info.shape[-1] if info.shape else 1
    rows, step = info.size // (columns * dtype.itemsize), 1 if weight is None else row_step(weight)
    chunk = max(_CHUNK // (4 * columns) // step, 1) * step
    if merger is not None and merger.needs_all_rows:
        chunk = rows
    for first in range(0, rows, chunk):
        count = min(chunk, rows - first)
        if merger is not None and merger.replaces:
            floats = merger.rows(first, count)
        elif weight is not None and parts is not None:
            floats = decode_rows(weight, parts, first, count)
        else:
            floats = tensors.read_rows(info.name, first, count).float()
        floats = floats if merger is None else merger(floats, first)
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


class _Merging:
    """An adapter's folder, matched with the base."""

    def __init__(self, folder: Path, view: FloatView) -> None:
        self._folder = folder
        self._files = adapter_files([path.name for path in folder.iterdir() if path.is_file()])
        config = parse_json(ADAPTER_FILE, (folder / ADAPTER_FILE).read_bytes())
        shards = tuple(shard for shard in read_shards(folder) if shard.path.name == ADAPTER_WEIGHTS)
        self._tensors = SourceTensors(shards)
        infos = [stored.info for shard in shards for stored in shard.tensors]
        self.adapter: Adapter = read_adapter(config, infos, view.tensors)

    def of(self, name: str) -> Merger | None:
        merge = self.adapter.merges.get(name)
        return None if merge is None else Merger(merge, self._tensors)

    def grown(self, infos: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
        return {name: tensor_info(name, infos[name].dtype, shape) for name, shape in self.adapter.grown.items()}

    def copy_tokenizer(self, target: Path) -> None:
        for name in self._files:
            if name not in {ADAPTER_FILE, ADAPTER_WEIGHTS}:
                shutil.copyfile(self._folder / name, target / name)

    def resize_vocabulary(self, target: Path) -> None:
        """Write the number of tokens into config.json, if the adapter has tables of another number."""
        rows = {shape[0] for shape in self.adapter.grown.values()}
        if not rows:
            return
        path = target / "config.json"
        config = json.loads(path.read_bytes())
        if len(rows) > 1 or not isinstance(config.get("vocab_size"), int):
            raise NightpressError(
                ErrorCode.MALFORMED_MODEL,
                f"The adapter replaces tables of tokens by ones with {' and '.join(map(str, sorted(rows)))} rows, which config.json can't say.",
                hint="Merge it with peft (`merge_and_unload().save_pretrained(folder)`) and bring that folder.",
                file=ADAPTER_WEIGHTS,
            )
        write_json(path, {**config, "vocab_size": rows.pop()})


def adapter_of(source: Path) -> Path | None:
    """The folder of the adapter that belongs to a model's folder; None if there is none."""
    folder = source / ADAPTER_DIR
    return folder if (folder / ADAPTER_FILE).is_file() else None
