"""What is trained: a module that computes its own loss."""

from abc import abstractmethod
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from nightpress.core.compress.data.examples import Batch

Held = TypeVar("Held")


class Objective(nn.Module):
    """A module that is trained. A checkpoint holds its trainable parameters and its buffers.

    Several processes each train a copy of it. What it does not own, it holds `Aside`. A batch is a process's part of a whole batch then, and
    a loss is the mean over the part times the part's share, so that the losses of all processes add up to the mean over the whole batch.
    """

    @abstractmethod
    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Means over the batch by name, 0-dimensional. Training minimises the one named `loss`."""

    @abstractmethod
    def validate(self, batch: Batch) -> dict[str, Tensor]:
        """Means over the batch by name, in evaluation mode. The weights with the smallest `loss` are the best."""


class Aside(Generic[Held]):
    """An object that a module uses and does not own. It is no submodule, so it is not trained, and copies of the module use the same one."""

    def __init__(self, held: Held) -> None:
        self.held = held

    def __deepcopy__(self, _memo: dict[int, Any]) -> "Aside[Held]":
        return self
