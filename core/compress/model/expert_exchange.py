"""Experts that live in different processes: tokens travel to the process of their expert, and the expert's answers travel back.

All experts of a mixture have equal shapes, so expert e lives in process e mod n. One round of exchanges serves n neighbouring experts, one
of each process, or more of them if they get few tokens. So a process holds at a time the tokens of n experts, or few tokens, whatever the
number of experts.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from nightpress.core.compress.ranks.group import Group
from nightpress.core.recipes.block_peak import EXCHANGED_TOKENS


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
        counts = self._counts([len(some) for some in tokens], hidden.device)
        for experts in self._rounds([sum(of_all) for of_all in zip(*counts, strict=True)]):
            by_owner = [experts[first :: self._group.size] for first in range(self._group.size)]
            own = by_owner[self._group.rank]
            leaving = [expert for others in by_owner for expert in others]
            sent = [sum(len(tokens[expert]) for expert in others) for others in by_owner]
            coming = [[source[expert] for expert in own] for source in counts]
            received = [sum(numbers) for numbers in coming]
            rows = hidden[torch.cat([tokens[expert] for expert in leaving])]
            made = self._run_own(own, self._group.exchange(rows, sent, received), coming, run)
            returned = self._group.exchange(made, received, sent)
            answers = torch.split(returned, [len(tokens[expert]) for expert in leaving])
            for expert, answer in sorted(zip(leaving, answers, strict=True), key=lambda pair: pair[0]):
                if len(answer):
                    yield expert, answer

    def _rounds(self, tokens: Sequence[int]) -> Iterator[range]:
        """The experts of each round: a multiple of the processes' number, but for the last. tokens: of each expert, from all processes."""
        start, size = 0, self._group.size
        while start < self._experts:
            end = start + size
            while end < self._experts and sum(tokens[start : end + size]) <= EXCHANGED_TOKENS:
                end += size
            if any(tokens[start:end]):
                yield range(start, min(end, self._experts))
            start = end

    def _run_own(
        self, own: Sequence[int], arrived: Tensor, coming: Sequence[Sequence[int]], run: Callable[[int, Tensor], Tensor]
    ) -> Tensor:
        """The answers of experts of this process to what arrived from all processes, in the order in which it arrived.

        coming: by process, the number of tokens for each of these experts, whose tokens follow each other.
        """
        if len(own) <= 1:
            return run(own[0], arrived) if len(arrived) else arrived
        sources = torch.split(arrived, [sum(numbers) for numbers in coming])
        parts = [list(torch.split(rows, list(numbers))) for rows, numbers in zip(sources, coming, strict=True)]
        for at, expert in enumerate(own):
            if any(numbers[at] for numbers in coming):
                made = run(expert, torch.cat([of_source[at] for of_source in parts]))
                for of_source, answers in zip(
                    parts, torch.split(made, [numbers[at] for numbers in coming]), strict=True
                ):
                    of_source[at] = answers
        return torch.cat([answers for of_source in parts for answers in of_source])

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
