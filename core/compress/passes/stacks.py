"""Stacks of weights that a GPU settles side by side: those of a mixture's experts, which have equal shapes and inputs of their own.

Several processes that settle the same stacks share out the rows of each weight.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nightpress.core.compress.executors.side_by_side import side_by_side
from nightpress.core.compress.executors.watch import Inputs
from nightpress.core.compress.ranks.group import ALONE, Group
from nightpress.core.compress.solvers.gram import Gram
from nightpress.core.compress.solvers.obs import Factor, factorize, hand_round
from nightpress.core.compress.solvers.shared_factor import owners


@dataclass(frozen=True)
class Stack:
    """Groups of weights with the same names' schemes, shapes and dtypes. Weights of one group read the same inputs."""

    groups: tuple[Inputs, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The weights of the first group."""
        return self.groups[0].names

    @property
    def columns(self) -> int:
        return _gram(self.groups[0]).columns

    def gram(self) -> Tensor:
        """[in, in] for a single group, else [groups, in, in]"""
        return _stacked([_gram(group).matrix() for group in self.groups])

    def weights(
        self, block: Mapping[str, Tensor], places: Sequence[int], device: torch.device, group: Group = ALONE
    ) -> Tensor:
        """This process's rows of the weights at these places of every group, stacked along the rows: [out, in] or [groups, out, in], float32."""
        parts = [[share_rows(block[seen.names[at]], group).to(device).float() for at in places] for seen in self.groups]
        return _stacked([torch.cat(rows) for rows in parts])

    def each(
        self, result: Tensor, block: Mapping[str, Tensor], places: Sequence[int], group: Group = ALONE
    ) -> dict[str, Tensor]:
        """Weight → this process's rows of a result that was computed for `weights` of the same places and processes."""
        parts = [result] if len(self.groups) == 1 else list(result)
        found: dict[str, Tensor] = {}
        for seen, part in zip(self.groups, parts, strict=True):
            chosen = [seen.names[at] for at in places]
            rows = torch.split(part, [len(share_rows(block[name], group)) for name in chosen])
            found |= dict(zip(chosen, rows, strict=True))
        return found

    def sharing(self, block: Mapping[str, Tensor], places: Sequence[int], group: Group, *, free: bool) -> Group:
        """The processes that share out the rows of the weights at these places: all, or this one alone where rows can't be divided.

        free: whether rows don't depend on each other. Else the processes divide only a single weight.
        """
        single = len(self.groups) == len(places) == 1
        return sharing([block[self.names[at]] for at in places], group) if free or single else ALONE


def stacks(
    block: Mapping[str, Tensor], inputs: Sequence[Inputs], device: torch.device, kind: Callable[[str], Hashable]
) -> Iterator[Stack]:
    """Divide groups of weights into stacks whose members have equal shapes, dtypes and kinds. On a CPU each group is alone.

    kind: what must be equal beside the shape, e.g. the scheme.
    """
    kinds = {name: kind(name) for group in inputs for name in group.names}
    return map(Stack, side_by_side(block, inputs, device, kinds))


def factored(
    found: Iterable[Stack], device: torch.device, group: Group, *, damping: float, by_power: bool
) -> Iterator[tuple[Stack, Tensor, Factor]]:
    """Yield each stack with its Gram matrices and their factor, which all processes hold in the end; see `owners`.

    A process holds one factor more than a single process does. That one is smaller than those that are computed together.
    """
    listed = list(found)
    single = [stack.columns if len(stack.groups) == 1 else 0 for stack in listed]
    who = owners(single, group.size, device.type)
    mine = iter([stack for stack, owner in zip(listed, who, strict=True) if owner == group.rank])
    own: Factor | None = None
    for stack, owner in zip(listed, who, strict=True):
        if owner == 0 and (next_own := next(mine, None)) is not None:  # a round of factors begins
            own = factorize(next_own.gram(), damping=damping, by_power=by_power)
        gram = stack.gram()
        if isinstance(owner, int):
            given = own if owner == group.rank else None
            yield stack, gram, hand_round(given, gram, owner, group, by_power=by_power)
        else:
            ranks = group if owner == "together" else ALONE
            yield stack, gram, factorize(gram, damping=damping, by_power=by_power, group=ranks)


def sharing(weights: Iterable[Tensor], group: Group) -> Group:
    """The processes that share out the rows of weights [out, in]: all, or this one alone if a weight has fewer rows than there are processes."""
    return group if all(len(weight) >= group.size for weight in weights) else ALONE


def share_rows(weight: Tensor, group: Group) -> Tensor:
    """This process's rows of a weight [out, in] that all processes hold: [part, in]."""
    return weight if group.size == 1 else weight[group.share(len(weight))]


def _stacked(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts)


def _gram(group: Inputs) -> Gram:
    assert isinstance(group.statistic, Gram)
    return group.statistic
