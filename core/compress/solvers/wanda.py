"""Wanda: weights go by magnitude times the norm of their input, compared within a row; the others stay as they are.

Sun et al., A Simple and Effective Pruning Approach for Large Language Models (arXiv 2306.11695), eq. 1.
"""

import torch
from torch import Tensor


class Power:
    """A running Σ x² of a linear layer's inputs, in float32."""

    def __init__(self, columns: int, device: torch.device | str) -> None:
        self.sum = torch.zeros(columns, device=device)
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Take in [..., columns], of any float dtype."""
        x = inputs.reshape(-1, inputs.shape[-1])
        self.sum += x.float().square().sum(0)
        self.tokens += len(x)


def wanda_mask(weight: Tensor, power: Tensor, sparsity: float, pattern: tuple[int, int] | None = None) -> Tensor:
    """True where a weight [out, in] goes; power [in] is Σ x². With a pattern (kept, of), so many of every `of` neighbours stay."""
    rows, columns = weight.shape
    score = weight.float().abs() * power.sqrt()
    compared = score.view(rows, -1, pattern[1]) if pattern is not None else score.view(rows, 1, columns)
    count = pattern[1] - pattern[0] if pattern is not None else round(sparsity * columns)
    gone = torch.zeros_like(compared, dtype=torch.bool)
    gone.scatter_(2, compared.argsort(dim=2, stable=True)[..., :count], True)
    return gone.view(rows, columns)
