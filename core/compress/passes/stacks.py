"""Stacks of weights that a GPU settles side by side: those of a mixture's experts, which have equal shapes and inputs of their own."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nightpress.core.compress.executors.watch import Inputs
from nightpress.core.compress.ranks.group import ALONE, Group
from nightpress.core.compress.solvers.gram import Gram
from nightpress.core.recipes.block_peak import stack_size


@dataclass(frozen=True)
class Stack:
    """Groups of weights with the same names' schemes, shapes and dtypes. Weights of one group read the same inputs."""

    groups: tuple[tuple[str, ...], ...]  #: names of the weights
    gram: Tensor  #: [in, in] for a single group, else [groups, in, in]

    def weights(self, block: Mapping[str, Tensor], places: Sequence[int], device: torch.device) -> Tensor:
        """The weights at these places of every group, stacked along the rows: [out, in] or [groups, out, in], float32."""
        return _stacked([torch.cat([block[names[at]].to(device).float() for at in places]) for names in self.groups])

    def each(self, result: Tensor, block: Mapping[str, Tensor], places: Sequence[int]) -> dict[str, Tensor]:
        """Weight → its rows of a result that was computed for `weights` of the same places."""
        parts = [result] if len(self.groups) == 1 else list(result)
        found: dict[str, Tensor] = {}
        for names, part in zip(self.groups, parts, strict=True):
            chosen = [names[at] for at in places]
            rows = torch.split(part, [len(block[name]) for name in chosen])
            found |= dict(zip(chosen, rows, strict=True))
        return found


def stacks(
    block: Mapping[str, Tensor], inputs: Sequence[Inputs], device: torch.device, kind: Callable[[str], Hashable]
) -> Iterator[Stack]:
    """Divide groups of weights into stacks whose members have equal shapes, dtypes and kinds. On a CPU each group is alone.

    kind: what must be equal beside the shape, e.g. the scheme.
    """
    alike: dict[Hashable, list[Inputs]] = {}
    for group in inputs:
        like = tuple((kind(name), tuple(block[name].shape), block[name].dtype) for name in group.names)
        alike.setdefault(like, []).append(group)
    for groups in alike.values():
        columns = block[groups[0].names[0]].shape[1]
        rows = sum(len(block[name]) for name in groups[0].names)
        most = stack_size(rows, columns, len(groups)) if device.type == "cuda" else 1
        for start in range(0, len(groups), most):
            chosen = groups[start : start + most]
            yield Stack(tuple(group.names for group in chosen), _stacked([_gram(group).matrix() for group in chosen]))


def sharing(weights: Tensor, group: Group, *, free: bool) -> Group:
    """The processes that share out the rows of weights [..., out, in]: all, or this one alone where the rows can't be divided.

    free: whether rows don't depend on each other. Else the processes divide only a single weight.
    """
    return group if weights.shape[-2] >= group.size and (free or weights.dim() == 2) else ALONE


def share_rows(weights: Tensor, group: Group) -> Tensor:
    """This process's rows of weights [..., out, in] that all processes hold: [..., part, in]."""
    return weights if group.size == 1 else weights[..., group.share(weights.shape[-2]), :].contiguous()


def join_rows(part: Tensor, weights: Tensor, group: Group) -> Tensor:
    """Join results [..., part, n] of the rows that `share_rows` gave to each process: [..., out, n]."""
    if group.size == 1:
        return part
    return group.join_rows(part.movedim(-2, 0).contiguous(), weights.shape[-2]).movedim(0, -2).contiguous()


def _stacked(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts)


def _gram(group: Inputs) -> Gram:
    assert isinstance(group.statistic, Gram)
    return group.statistic
