"""The bytes that zeros would save on disk, in storage forms that keep only the nonzero weights."""

import zlib
from collections.abc import Collection
from pathlib import Path

from nightpress.core.compress.model.checkpoint import Shard, read_shards
from nightpress.core.handoff.report import PassRecord

#: Bytes of each layer that are compressed. A whole model would take minutes, and the weights of a layer compress alike everywhere.
_DEFLATE_SAMPLE = 64 * 1024


def with_storage(record: PassRecord, source: Path, target: Path) -> PassRecord:
    """Return the record of a pruning pass with the bytes of the pruned layers in each storage form: `storage` in its summary.

    `dense`: as they are in the files. `bitmap`: a bit for each weight, and the nonzero weights. `csr`: the nonzero weights, the column of
    each in 2 or 4 bytes, and the start of each row in 4 bytes. `deflate`: the dense bytes compressed by zlib at level 1, extrapolated from
    the first 64 KiB of each layer. `deflate_before`: the same for the source, because its weights compress a little, too.
    """
    zeros = {f"{layer.name}.weight": layer.sparsity or 0.0 for layer in record.layers}
    found = {"dense": 0, "bitmap": 0, "csr": 0}
    for shard in read_shards(target):
        for tensor in shard.tensors:
            if tensor.name in zeros:
                rows, columns = tensor.info.shape
                item = tensor.info.size // (rows * columns)
                kept = rows * columns - round(zeros[tensor.name] * rows * columns)
                found["dense"] += tensor.info.size
                found["bitmap"] += -(-rows * columns // 8) + kept * item
                found["csr"] += kept * (item + (2 if columns <= 1 << 16 else 4)) + 4 * (rows + 1)
    for name, folder in (("deflate_before", source), ("deflate", target)):
        found[name] = round(found["dense"] * _deflated_share(read_shards(folder), zeros.keys()))
    return record.model_copy(update={"summary": record.summary | {"storage": found}})


def _deflated_share(shards: tuple[Shard, ...], names: Collection[str]) -> float:
    raw = deflated = 0
    for shard in shards:
        with shard.path.open("rb") as file:
            for tensor in shard.tensors:
                if tensor.name in names:
                    file.seek(tensor.offset)
                    sample = file.read(min(_DEFLATE_SAMPLE, tensor.info.size))
                    raw += len(sample)
                    deflated += len(zlib.compress(sample, level=1))
    return deflated / max(1, raw)
