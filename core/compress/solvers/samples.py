"""A sample of a stream of tokens, which does not depend on how the stream is divided into batches."""

import torch
from torch import Tensor

from nightpress.core.compress.ranks.group import Group

_MOST = 1024  #: tokens that are kept at most; half of them stay when a further token comes


class EvenSample:
    """Every n-th token of a stream, where n is the smallest power of two that keeps at most `_MOST` tokens.

    The sample depends only on the tokens and their order. Padding changes how many texts are in a batch, but not the sample.
    """

    def __init__(self) -> None:
        self._every, self._came = 1, 0
        self._kept: list[Tensor] = []

    def add(self, tokens: Tensor) -> None:
        """Add tokens [tokens, columns]."""
        self._kept.append(tokens[-self._came % self._every :: self._every].clone())
        self._came += len(tokens)
        while -(-self._came // self._every) > _MOST:
            self._every *= 2
            self._kept = [torch.cat(self._kept)[::2].clone()]

    def combine(self, group: Group, device: torch.device) -> None:
        """Put the samples of all processes one after the other, by rank.

        The sample is that of one stream if each process's number of tokens is a multiple of the distance between two kept tokens. Else
        the distance at the seams is another one.
        """
        if group.size == 1:
            return
        seen = group.collect((self._every, self._came))
        self._came = sum(came for _, came in seen)
        every = max(every for every, _ in seen)
        own = self.tokens()[:: every // self._every]
        parts = group.merge({str(group.rank): own} if len(own) else {}, device)
        self._every, self._kept = every, list(parts.values())
        while sum(map(len, self._kept)) > _MOST:
            self._every *= 2
            self._kept = [torch.cat(self._kept)[::2].clone()]

    def tokens(self) -> Tensor:
        """The kept tokens [kept, columns] in their order of arrival; [0, 0] if there were none."""
        return torch.cat(self._kept) if self._kept else torch.empty(0, 0)
