"""A teacher's logits, computed once and kept on disk. Of a vocabulary's logits, only the largest are kept, and the others' sum."""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.data.examples import Batch, Examples, collate
from nightpress.core.compress.model.checkpoint import ShardWriter, tensor_bytes, tensor_info
from nightpress.core.compress.solvers.distillation import with_the_rest
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.passes.distill import Teaching

#: (batch) → the model's inputs, the mask of positions that are scored, the labels at these positions
Inputs = Callable[[Batch], tuple[dict[str, Tensor], Tensor | None, Tensor | None]]


@dataclass(frozen=True)
class CachedLogits:
    """The k largest logits of every scored position. The positions of all texts are stored one after the other.

    If there are more than k classes, a last value stands for the others together, as in `with_the_rest`.
    """

    files: Sequence[Path]  #: of neighbouring texts, in their order
    firsts: Sequence[int]  #: of each file, the number of its first text
    starts: Tensor  #: int64 [N + 1], index of each text's first position; the last value is the number of positions
    size: int  #: bytes

    def of(self, batch: Batch, where: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return (values float32 [M, k or k + 1], indices int64 [M, k]): for the batch's scored positions, in their order, on its device."""
        del where
        values, indices = [], []
        with ExitStack() as stack:
            opened = [stack.enter_context(safe_open(file, framework="pt")) for file in self.files]
            slices = [(file.get_slice("values"), file.get_slice("indices")) for file in opened]
            for number in batch.numbers.tolist():
                at = bisect_right(self.firsts, number) - 1
                start, end = (int(self.starts[text] - self.starts[self.firsts[at]]) for text in (number, number + 1))
                all_values, all_indices = slices[at]
                values.append(all_values[start:end])
                indices.append(all_indices[start:end])
        device = batch.ids.device
        return torch.cat(values).to(device).float(), torch.cat(indices).to(device).long()


def cache_logits(
    teacher: Any,
    inputs: Inputs,
    examples: Examples,
    options: Teaching,
    context: PassContext,
    *,
    span: tuple[float, float],
) -> CachedLogits:
    """Run the teacher over all examples and write its largest logits, or use the file that an earlier attempt wrote.

    Of several processes, each takes neighbouring examples and writes a file of its own.

    span: start and end of this step within the pass's progress. Raises NightpressError(invalid_recipe) if the file would be larger than
    `cache_bytes`; then nothing is written.
    """
    assert options.logits is not None
    device = torch.device(context.device)
    classes = int(
        getattr(teacher.config, "num_labels", 2)
        if context.header.task == "classification"
        else teacher.config.vocab_size
    )
    top, temperature = min(options.logits.cache_top, classes), options.logits.temperature
    counts: list[int] = []
    for chosen in _in_batches(slice(0, len(examples)), options.train.batch):
        _, where, _ = inputs(collate(examples, chosen, torch.device("cpu")))
        counts += [1] * len(chosen) if where is None else where.sum(1).tolist()
    starts = torch.tensor([0, *counts]).cumsum(0)
    size = int(starts[-1]) * 4 * (top + top + (top < classes))
    if size > options.logits.cache_bytes:
        raise NightpressError(
            ErrorCode.INVALID_RECIPE,
            f"The teacher's answers to {len(examples):,} examples, {top} logits each position, would take {size / 1e9:.1f} GB on disk; `cache_bytes` allows {options.logits.cache_bytes / 1e9:.1f} GB.",
            hint="Lower `cache_top`, raise `cache_bytes`, or leave `cache` out.",
        )
    # A pass has one teacher: its own source, or the job's source. The key has the pass's index: another pass may have another teacher.
    key = hashlib.sha256(examples.digest() + f"{context.index} {top} {temperature} {device.type}".encode())
    name, group = key.hexdigest()[:16], context.group
    parts = [group.share_of_rank(rank, len(examples)) for rank in range(group.size)]
    names = [name] if group.size == 1 else [f"{name}-{rank + 1}-of-{group.size}" for rank in range(group.size)]
    files = [context.work_dir / "answers" / f"{part}.safetensors" for part in names]
    own, file = parts[group.rank], files[group.rank]
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = int(starts[own.stop] - starts[own.start])
        width = top + (top < classes)
        infos = [tensor_info("values", "F32", (rows, width)), tensor_info("indices", "I32", (rows, top))]
        with ShardWriter(file, infos) as shard, torch.no_grad():
            for chosen in _in_batches(own, options.train.batch):
                start = int(chosen[0])
                read, where, _ = inputs(collate(examples, chosen, device))
                logits = teacher(**read).logits
                scored = (logits if where is None else logits[where]).float()
                best = scored.topk(top, dim=-1)
                values = with_the_rest(scored, best.indices, temperature) if top < classes else best.values
                at = int(starts[start] - starts[own.start]) * 4
                shard.write("values", at * width, _bytes(values))
                shard.write("indices", at * top, _bytes(best.indices.int()))
                context.progress(
                    span[0] + (span[1] - span[0]) * (start - own.start) / (own.stop - own.start),
                    f"asking the teacher, {start - own.start:,} of {own.stop - own.start:,}",
                )
            shard.commit()
    group.collect(None)
    for written in files:
        context.checkpoint(written.relative_to(context.work_dir).as_posix(), 1)
    return CachedLogits(files, [part.start for part in parts], starts, size)


def _in_batches(texts: slice, batch: int) -> Iterator[NDArray[np.int64]]:
    for start in range(texts.start, texts.stop, batch):
        yield np.arange(start, min(start + batch, texts.stop))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor_bytes(tensor.cpu().contiguous())
