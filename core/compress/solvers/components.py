"""Principal components, and weights by frequency, of a table of token vectors."""

import torch
from torch import Tensor


def principal_components(vectors: Tensor, count: int) -> tuple[Tensor, float]:
    """Vectors [N, H] float64 → their first `count` principal components [N, count], and the share of the variance that these hold.

    The mean is subtracted. Each component's sign is that of its largest entry, so that the same vectors give the same result everywhere.
    """
    centred = vectors - vectors.mean(dim=0)
    variances, directions = torch.linalg.eigh(centred.T @ centred)  # ascending; directions [H, H] in columns
    chosen = directions[:, -count:].flip(1)
    signs = torch.gather(chosen, 0, chosen.abs().argmax(dim=0, keepdim=True)).sign()
    kept = float(variances[-count:].sum() / variances.sum().clamp(min=1e-30))
    return centred @ (chosen * signs), kept


def zipf_weights(count: int, a: float) -> Tensor:
    """The weight a / (a + p) of each of `count` tokens, float64 [count], where p falls with the rank as Zipf's law says: p ∝ 1 / (rank + 1).

    Arora et al., A Simple but Tough-to-Beat Baseline (ICLR 2017), eq. 3; ranks from 1 on, as in model2vec's `compute_weights`.
    """
    inverse = 1 / torch.arange(2, count + 2, dtype=torch.float64)
    return a / (a + inverse / inverse.sum())
