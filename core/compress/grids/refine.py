"""Fitting scales to a weight whose codes are chosen."""

import torch
from torch import Tensor


def fit_scales(
    weight: Tensor, gram: Tensor, steps: Tensor, scale: Tensor, stored: torch.dtype, *, damping: float, sweeps: int = 1
) -> Tensor:
    """Scales [out, groups] with which the codes come nearest to a weight's outputs, one group after the other, least squares for each.

    weight [out, in] float32; gram [in, in], to whose diagonal `damping` is added; steps [out, in], codes less zero points, in the weight's dtype; scale [out, groups] to
    start from. A scale moves only where that lowers (w − ŵ)H(w − ŵ)ᵀ, and only to a number that `stored` holds.
    """
    rows, groups = scale.shape
    width = weight.shape[1] // groups
    scale = scale.clone()
    lost = weight - (steps.view(rows, groups, width) * scale[..., None]).view_as(weight)
    pulled = torch.addmm(lost * damping, lost, gram)  # (w − ŵ)H
    for _ in range(sweeps):
        for group in range(groups):
            here = slice(group * width, (group + 1) * width)
            step = steps[:, here]
            spread = step @ gram[here]  # how the error of every input changes with the scale
            spread[:, here] += damping * step
            curve = (spread[:, here] * step).sum(1)
            slope = (pulled[:, here] * step).sum(1)
            best = (scale[:, group] + slope / curve.clamp(min=1e-30)).to(stored).to(scale.dtype)
            moved = best - scale[:, group]
            moved = torch.where((best > 0) & (moved * (moved * curve - 2 * slope) < 0), moved, torch.zeros_like(moved))
            scale[:, group] += moved
            pulled -= spread.mul_(moved[:, None])
    return scale
