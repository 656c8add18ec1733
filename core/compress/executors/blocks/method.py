"""The interface between a calibrated method and the blocks executor.

To *settle* a weight is to compute its final value.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nightpress.core.compress.executors.live_block import LiveBlock
from nightpress.core.compress.executors.rewrite import Effect
from nightpress.core.compress.executors.watch import Inputs, Statistic
from nightpress.core.compress.ranks.group import Group


@dataclass(frozen=True)
class FinalTensor:
    """The final value of a tensor of a block."""

    weight: Tensor  #: exactly the tensor that a loader makes of `tensors`, e.g. dequantized codes
    #: The tensors to write, by name, on any device. Only those of the first process are written: others may leave them out.
    tensors: dict[str, Tensor]
    effect: Effect | None  #: None for a tensor that is no linear weight, but compensates for the change of one
    joined: bool = False  #: whether `weight` was joined from rows of all processes, so that all have the same bits


class Written(NamedTuple):
    """What is written for a tensor of a block, and reported about it: a `FinalTensor` without its weight."""

    tensors: Mapping[str, Tensor]
    effect: Effect | None


class Method(Protocol):
    """A calibrated method: a statistic of the layers' inputs, and the computation of new weights from it.

    Where several processes settle a block, each has the method, the block and the statistics of all samples, and must come to the same
    weights. `LiveBlock.group` lets a method share out its work. `LiveBlock.own` names the weights of experts that this process alone has and
    settles.
    """

    @property
    def by_group(self) -> bool:
        """Whether layers that share their inputs can be settled without the block's other layers. Then `settle` may be called per group."""

    def watch(self, columns: int, device: torch.device) -> Statistic: ...

    def settle(self, block: LiveBlock, inputs: Sequence[Inputs], device: torch.device) -> dict[str, FinalTensor]:
        """The final tensors of a block by name: all watched weights, and other tensors if the method changes them.

        block: the present tensors by name, in their stored dtype.
        """

    def restore(self, name: str, written: Mapping[str, Tensor]) -> Tensor:
        """A settled linear weight, made of its written tensors."""


class CacheStandIn(Protocol):
    """An object that blocks get in place of a key/value cache. It sees the keys and values that they would cache."""

    real: Tensor | None  #: bool [B, L] of the current batch: False for padding; None: no padding

    def sees(self, names: Iterable[str]) -> bool:
        """Whether a block with tensors of these names gets it. Blocks without attention have caches of other kinds."""

    def combine(self, group: Group) -> None:
        """Add what the other processes have seen in the block."""


@dataclass(frozen=True)
class RunResult:
    """The result of a run of the blocks executor."""

    effects: dict[str, Effect]  #: by weight
    bytes_after: dict[str, int]  #: by weight: bytes of all tensors that were written for it
    unseen: tuple[str, ...]  #: weights that no calibration token reached
    #: Weight → number of tokens routed to its expert where these were too few, and all tokens were used.
    undersampled: dict[str, int]
    kept: tuple[str, ...]  #: matrices that were copied unchanged
    warnings: dict[str, int]  #: warning for the report → number of blocks that it applies to
    figures: dict[str, dict[int, float]]  #: name → by index of a block
