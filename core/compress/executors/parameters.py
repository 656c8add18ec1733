"""The trainable parameters of a module, as the training loop sees them: whole in one process, or shared out among several (see `sharded`)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from nightpress.core.compress.executors.objective import Objective
from nightpress.core.compress.ranks.group import ALONE, Group


class Parameters:
    """A module whose trainable parameters are whole in this process."""

    def __init__(self, module: Objective, own: Mapping[str, Tensor], group: Group = ALONE) -> None:
        self.module = module  #: computes the losses, on the device
        self.own = own  #: by name, what the optimizer changes: the parameter, or this process's rows of it
        self._group = group

    def take_gradients(self) -> None:
        """Make the gradients those of `own`."""

    def clip(self, largest: float) -> None:
        """Scale the gradients so that the norm of all together is at most `largest`."""
        found = [part.grad for part in self.own.values() if part.grad is not None]
        total = torch.nn.utils.get_total_norm(found)
        if self._group.size > 1:
            squares = total.square()
            self._group.sum(squares)
            total = squares.sqrt()
        torch.nn.utils.clip_grads_with_norm_(self.own.values(), largest, total)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a whole parameter."""
        return tuple(self.own[name].shape)

    def rows(self, name: str) -> slice:  # noqa: ARG002 - all parameters are whole
        """The rows of a whole parameter that are in `own`."""
        return slice(None)

    def whole(self, name: str, part: Tensor) -> Tensor:  # noqa: ARG002
        """Join the parts of all processes. part: of the shape of own[name]. All processes call it in the same order."""
        return part

    def between_batches(self) -> None:
        """Free what was gathered for a batch without a backward pass."""

    def settle(self) -> None:
        """Write the parameters into the module that was given to `hold`."""
