"""Experts that live in different processes: tokens travel to the process of their expert, and the expert's answers travel back.

All experts of a mixture have equal shapes, so expert e lives in process e mod n. One round of exchanges serves n neighbouring experts, one
of each process. So a process holds at a time the tokens of n experts at most, whatever the number of experts.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from nightpress.core.compress.ranks.group import Group


class ExpertExchange:
    """The processes in which a mixture's experts live. All of them call the same methods in the same order, also without tokens."""

    def __init__(self, group: Group, experts: int) -> None:
        self._group, self._experts = group, experts

    @property
    def own(self) -> range:
        """The numbers of the experts that live in this process."""
        return range(self._group.rank, self._experts, self._group.size)

    def owner(self, expert: int) -> int:
        """The rank of the process in which an expert lives."""
        return expert % self._group.size

    def answers(
        self, hidden: Tensor, tokens: Sequence[Tensor], run: Callable[[int, Tensor], Tensor]
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield (expert, its answers [n, width]) for each expert that gets some of this process's tokens, in the order of the experts.

        hidden [tokens, width]; tokens: for each expert, the indices [n] of its tokens. run: an expert of this process on the tokens of all.
        """
        size, rank = self._group.size, self._group.rank
        counts = self._counts([len(some) for some in tokens], hidden.device)
        for first in range(0, self._experts, size):
            sent = counts[rank][first : first + size]
            sent += [0] * (size - len(sent))
            here = first + rank
            received = [others[here] if here < self._experts else 0 for others in counts]
            if not any(any(others[first : first + size]) for others in counts):
                continue
            arrived = self._group.exchange(hidden[torch.cat(list(tokens[first : first + size]))], sent, received)
            made = run(here, arrived) if len(arrived) else arrived
            returned = self._group.exchange(made, received, sent)
            for expert, answer in enumerate(torch.split(returned, sent), first):
                if len(answer):
                    yield expert, answer

    def show_all(self, hidden: Tensor, experts: Sequence[int], run: Callable[[int, Tensor], object]) -> None:
        """Run some experts of this process on the tokens of all processes: hidden [tokens, width] are those of this one."""
        for rank, (length,) in enumerate(self._counts([len(hidden)], hidden.device)):
            rows = hidden.contiguous() if rank == self._group.rank else hidden.new_empty(length, hidden.shape[1])
            self._group.hand_round(rows, rank)
            for expert in experts if length else ():
                run(expert, rows)

    def _counts(self, own: Sequence[int], device: torch.device) -> list[list[int]]:
        """The numbers of all processes, by rank."""
        found = torch.zeros(self._group.size, len(own), dtype=torch.long)
        found[self._group.rank] = torch.tensor(own)
        found = found.to(device)
        self._group.sum(found)
        return found.tolist()
