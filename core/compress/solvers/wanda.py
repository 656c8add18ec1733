"""Wanda: prune the weights of each row with the least magnitude times norm of their input. The other weights do not change.

Sun et al., A Simple and Effective Pruning Approach for Large Language Models (arXiv 2306.11695), eq. 1.
"""

import torch
from torch import Tensor

from nightpress.core.compress.ranks.group import Group


class Power:
    """A running Σ x² of a linear layer's inputs, in float32."""

    def __init__(self, columns: int, device: torch.device | str) -> None:
        self.sum = torch.zeros(columns, device=device)
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Add inputs [..., columns], of any float dtype."""
        x = inputs.reshape(-1, inputs.shape[-1])
        self.sum += x.float().square().sum(0)
        self.tokens += len(x)

    def combine(self, group: Group) -> None:
        """Add what the other processes have added."""
        self.tokens = group.total(self.tokens)
        group.sum(self.sum)

    def is_finite(self) -> bool:
        """Whether all inputs and their sums are finite."""
        return bool(torch.isfinite(self.sum).all())


def wanda_mask(weight: Tensor, power: Tensor, sparsity: float, pattern: tuple[int, int] | None = None) -> Tensor:
    """True where a weight [out, in] is pruned. power [in] is Σ x² of the inputs.

    sparsity is the pruned share of each row. With a pattern (kept, of), `kept` of every `of` neighbours stay and `sparsity` is not used.
    """
    rows, columns = weight.shape
    score = weight.float().abs() * power.sqrt()
    if pattern is not None:
        return _outranked(score.view(rows, -1, pattern[1]), pattern[0]).view(rows, columns)
    count = round(sparsity * columns)
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    bound = score.kthvalue(count, dim=1, keepdim=True).values  # selecting is several times faster than sorting
    gone, equal = score < bound, score == bound
    missing = count - gone.sum(1, keepdim=True)
    return gone | (equal & (equal.cumsum(1) <= missing))  # of equal scores, the first are pruned


def _outranked(score: Tensor, kept: int) -> Tensor:
    """True for all but the `kept` largest along the last axis; of equals, the first is True. Counting beats sorting for short groups."""
    members = score.unbind(-1)
    outranked = torch.zeros_like(score, dtype=torch.uint8)
    for first, member in enumerate(members):
        for second, other in enumerate(members[first + 1 :], first + 1):
            earlier_wins = member > other
            outranked[..., second] += earlier_wins
            outranked[..., first] += ~earlier_wins
    return outranked >= kept
