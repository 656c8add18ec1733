"""Some of many tokens, chosen without a look at the batches that they come in."""

import torch
from torch import Tensor

_MOST = 1024  #: tokens that are held at most; half as many once more have come


class EvenSample:
    """Every n-th token of all that came, n being the smallest power of two with which `_MOST` are enough.

    What is kept depends on the tokens and their order alone: padding, which changes how many texts make a batch, changes nothing.
    """

    def __init__(self) -> None:
        self._every, self._came = 1, 0
        self._kept: list[Tensor] = []

    def add(self, tokens: Tensor) -> None:
        """Take in [tokens, columns]."""
        self._kept.append(tokens[-self._came % self._every :: self._every].clone())
        self._came += len(tokens)
        while -(-self._came // self._every) > _MOST:
            self._every *= 2
            self._kept = [torch.cat(self._kept)[::2].clone()]

    def tokens(self) -> Tensor:
        """[kept, columns], in the order in which they came; [0, 0] if none did."""
        return torch.cat(self._kept) if self._kept else torch.empty(0, 0)
