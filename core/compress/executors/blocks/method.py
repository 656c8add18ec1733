"""What a calibrated method provides to the blocks executor, and what the executor hands back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nightpress.core.compress.executors.live_block import LiveBlock
from nightpress.core.compress.executors.rewrite import Effect
from nightpress.core.compress.executors.watch import Inputs, Statistic


@dataclass(frozen=True)
class FinalTensor:
    """A tensor of a block as it will be from now on."""

    weight: Tensor  #: exactly what a loader makes of `tensors`
    tensors: dict[str, Tensor]  #: what is written, by name, on any device
    effect: Effect | None  #: None if it is no linear weight, but compensates for what was done to one


class Method(Protocol):
    """A calibrated method: what it sums up of a layer's inputs, and what it makes of weights."""

    @property
    def by_group(self) -> bool:
        """Whether layers that share their inputs are settled without the block's other layers: then `settle` may be called group by group."""

    def watch(self, columns: int, device: torch.device) -> Statistic: ...

    def settle(self, block: LiveBlock, inputs: Sequence[Inputs], device: torch.device) -> dict[str, FinalTensor]:
        """The new tensors of a block: of all that were watched, and of others if need be. The block gives them by name in their stored dtype."""

    def restore(self, name: str, written: Mapping[str, Tensor]) -> Tensor:
        """A settled linear weight from what was written."""


class CacheStandIn(Protocol):
    """What blocks are given in place of a key/value cache, to see what they would cache."""

    real: Tensor | None  #: bool [B, L] of the batch that runs: False where it is padding; None: nowhere


@dataclass(frozen=True)
class RunResult:
    """What a run did."""

    effects: dict[str, Effect]  #: by weight
    bytes_after: dict[str, int]  #: by weight, of all that was written for it
    unseen: tuple[str, ...]  #: weights that no calibration token reached
    #: Weight → number of tokens routed to its expert where these were too few, and all tokens were used.
    undersampled: dict[str, int]
    kept: tuple[str, ...]  #: matrices that were copied
    warnings: dict[str, int]  #: what a person should know → of how many blocks it is true
