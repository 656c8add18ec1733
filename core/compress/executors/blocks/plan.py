"""The plan of a run of the blocks executor: the model, the samples, and the weights to settle."""

import hashlib
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate, count, pairwise
from pathlib import Path

import torch
from torch import Tensor

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.executors.batches import count_of, split_mask, tokens_a_sample
from nightpress.core.compress.executors.live_block import probe_of
from nightpress.core.compress.model.checkpoint import SAFETENSORS_DTYPES
from nightpress.core.compress.model.experts import Experts
from nightpress.core.compress.model.skeleton import Batch, Skeleton
from nightpress.core.compress.model.source import SourceTensors
from nightpress.core.compress.ranks.group import ALONE, Group
from nightpress.core.processor import multiplies_bfloat16
from nightpress.core.recipes.costs import batch_tokens
from nightpress.core.recipes.linears import is_expert

#: Format of the records that a run writes. A release with another format starts an interrupted run from the beginning.
RECORD_FORMAT = 3


@dataclass(frozen=True)
class BlockPlan:
    skeleton: Skeleton
    samples: Batch  #: the model's inputs in this process, each [samples, …]; without a mask if there is no padding
    real: Tensor | None  #: bool [samples, length]: False for padding; None: no padding
    total: int  #: the number of samples in all processes
    batch: int  #: samples in a batch, those of all processes if they learn
    batches: tuple[slice, ...]  #: the batches of this process's samples
    rounds: int  #: the most batches that a process has
    #: Number of a batch of all processes, as it is learned → of this process's part of it; None: it has no sample of that batch.
    numbers: tuple[int | None, ...]
    probe: Batch  #: the same in all processes: `probe_of` all samples
    probe_real: Tensor | None  #: bool [1, length], the probe's part of `real`
    group: Group
    chosen: frozenset[str]  #: the weights to settle
    digest: str  #: two attempts have the same digest only if they compute the same blocks

    @property
    def source(self) -> SourceTensors:
        return self.skeleton.source

    @property
    def device(self) -> torch.device:
        return self.skeleton.device

    @property
    def blocks(self) -> int:
        return len(self.skeleton.blocks)

    def chosen_of(self, index: int) -> dict[str, torch.nn.Module]:
        """The layers of a block that must be settled, by the names of their weights."""
        return {name: layer for name, layer in self.skeleton.linears(index).items() if name in self.chosen}


def make_plan(
    folder: Path,
    target: Path,
    samples: Batch,
    context: PassContext,
    chosen: frozenset[str],
    recipe: str,
    *,
    share: int,
    step: int | None,
) -> BlockPlan:
    """Make the plan.

    share: divides the usual batch size, e.g. 4 gives batches of a quarter of the size. step: samples of a learning step, which no batch
    exceeds; None: the method does not learn.

    Raises NightpressError for a model whose blocks can't be found.
    """
    source = SourceTensors.in_folder(folder)
    unmasked, real = split_mask(samples)
    dtype = _compute_dtype(source, chosen, context)
    group = context.group
    # Gradients don't travel between processes, so that a block that learns is whole in each of them.
    shared = step is None and _all_or_none_chosen(source.names(), chosen)
    skeleton = Skeleton(folder, source, context.device, dtype, probe_of(unmasked), group if shared else ALONE)
    total = count_of(unmasked)
    length = tokens_a_sample(samples, skeleton.config)
    mixture = any(isinstance(module, Experts) for module in skeleton.model.modules())
    batch = max(1, min(total, step or total, batch_tokens(skeleton.device.type, mixture=mixture) // share // length))
    digest = hashlib.sha256(f"{RECORD_FORMAT}\n{recipe}\n{batch}\n{skeleton.dtype}\n{target.name}".encode())
    if group.size > 1:  # another number of processes adds up in another order
        experts = ", which share out experts" * skeleton.shares_any_experts
        digest.update(f"{group.size} processes, which share out rows{experts}".encode())
    for name, tensor in sorted(samples.items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    for shard in source.shards:
        digest.update(shard.header)
    parts = _parts_of_batches(total, batch, group) if step is not None else _batches(total, batch, group)
    rows = [row for part in parts for row in part]
    ends = list(accumulate((len(part) for part in parts if part), initial=0))
    number = count()
    return BlockPlan(
        skeleton,
        unmasked if group.size == 1 else {name: tensor[rows] for name, tensor in unmasked.items()},
        real if real is None or group.size == 1 else real[rows],
        total,
        batch,
        tuple(slice(start, end) for start, end in pairwise(ends)),
        math.ceil(math.ceil(total / group.size) / batch),
        tuple(next(number) if part else None for part in parts),
        probe_of(unmasked),
        None if real is None else real[:1],
        group,
        chosen,
        digest.hexdigest()[:16],
    )


def _all_or_none_chosen(names: Sequence[str], chosen: Collection[str]) -> bool:
    """Whether of each mixture's layers of a kind, e.g. all experts' gates, all weights are chosen or none.

    Else the experts differ in what is settled, and a method could decide otherwise in each process.
    """
    kinds: dict[str, set[bool]] = {}
    for name in names:
        if is_expert(name):
            kinds.setdefault(re.sub(r"\.experts\.\d+\.", ".experts.*.", name), set()).add(name in chosen)
    return all(len(found) == 1 for found in kinds.values())


def _batches(total: int, batch: int, group: Group) -> list[range]:
    """The samples of each batch of this process: neighbours, divided into batches of this size."""
    own = range(total)[group.share(total)]
    return [own[at : at + batch] for at in range(0, len(own), batch)]


def _parts_of_batches(total: int, batch: int, group: Group) -> list[range]:
    """This process's part of each batch of all samples. So learning takes the same batches for each step as a single process does."""
    whole = [range(total)[at : at + batch] for at in range(0, total, batch)]
    return [samples[group.share(len(samples), turn)] for turn, samples in enumerate(whole)]


def _compute_dtype(source: SourceTensors, chosen: frozenset[str], context: PassContext) -> torch.dtype:
    """The dtype of the forward passes, as the recipe's `Calibration.dtype` describes it."""
    if context.calibration.dtype == "float32":
        return torch.float32
    if torch.device(context.device).type == "cpu":
        return torch.bfloat16 if multiplies_bfloat16() else torch.float32
    stored = {source.stored(name).info.dtype for name in chosen or source.names()}
    return next(
        (dtype for dtype in (torch.float32, torch.bfloat16) if SAFETENSORS_DTYPES[dtype] in stored), torch.float16
    )
