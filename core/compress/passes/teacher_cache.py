"""A teacher's logits, computed once and kept on disk. Of a vocabulary's logits, only the largest are kept, and the others' sum."""

import hashlib
from collections.abc import Callable, Iterator
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
from nightpress.core.compress.executors.rewrite import tensor_bytes
from nightpress.core.compress.model.checkpoint import ShardWriter, tensor_info
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

    file: Path
    starts: Tensor  #: int64 [N + 1], index of each text's first position; the last value is the number of positions
    size: int  #: bytes

    def of(self, batch: Batch, where: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return (values float32 [M, k or k + 1], indices int64 [M, k]): for the batch's scored positions, in their order, on its device."""
        del where
        values, indices = [], []
        with safe_open(self.file, framework="pt") as file:
            all_values, all_indices = file.get_slice("values"), file.get_slice("indices")
            for number in batch.numbers.tolist():
                rows = slice(int(self.starts[number]), int(self.starts[number + 1]))
                values.append(all_values[rows])
                indices.append(all_indices[rows])
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
    for chosen in _in_batches(examples, options.train.batch):
        _, where, _ = inputs(collate(examples, chosen, torch.device("cpu")))
        counts += [1] * len(chosen) if where is None else where.sum(1).tolist()
    starts = torch.tensor([0, *counts]).cumsum(0)
    rows = int(starts[-1])
    width = top + (top < classes)
    infos = [tensor_info("values", "F32", (rows, width)), tensor_info("indices", "I32", (rows, top))]
    size = sum(info.size for info in infos)
    if size > options.logits.cache_bytes:
        raise NightpressError(
            ErrorCode.INVALID_RECIPE,
            f"The teacher's answers to {len(examples):,} examples, {top} logits each position, would take {size / 1e9:.1f} GB on disk; `cache_bytes` allows {options.logits.cache_bytes / 1e9:.1f} GB.",
            hint="Lower `cache_top`, raise `cache_bytes`, or leave `cache` out.",
        )
    # A pass has one teacher: its own source, or the job's source. The key has the pass's index: another pass may have another teacher.
    key = hashlib.sha256(examples.digest() + f"{context.index} {top} {temperature} {device.type}".encode())
    file = context.work_dir / "answers" / f"{key.hexdigest()[:16]}.safetensors"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with ShardWriter(file, infos, {"format": "pt"}) as shard, torch.no_grad():
            for chosen in _in_batches(examples, options.train.batch):
                start = int(chosen[0])
                read, where, _ = inputs(collate(examples, chosen, device))
                logits = teacher(**read).logits
                scored = (logits if where is None else logits[where]).float()
                best = scored.topk(top, dim=-1)
                values = with_the_rest(scored, best.indices, temperature) if top < classes else best.values
                at = int(starts[start]) * 4
                shard.write("values", at * width, _bytes(values))
                shard.write("indices", at * top, _bytes(best.indices.int()))
                done = start / len(examples)
                context.progress(
                    span[0] + (span[1] - span[0]) * done, f"asking the teacher, {start:,} of {len(examples):,}"
                )
            shard.commit()
    context.checkpoint(file.relative_to(context.work_dir).as_posix(), 1)
    return CachedLogits(file, starts, size)


def _in_batches(examples: Examples, batch: int) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(examples), batch):
        yield np.arange(start, min(start + batch, len(examples)))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor_bytes(tensor.cpu().contiguous())
