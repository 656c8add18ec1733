"""Refit the scales of a weight whose codes are fixed."""

import torch
from torch import Tensor


def fit_scales(
    weight: Tensor, gram: Tensor, steps: Tensor, scale: Tensor, stored: torch.dtype, *, damping: Tensor, sweeps: int = 1
) -> Tensor:
    """Return scales [..., out, groups] that bring the codes' outputs nearest to a weight's outputs, by least squares group after group.

    weight [..., out, in] float32. gram [..., in, in]; H is gram with `damping` [...] added to its diagonal. steps [..., out, in]: codes
    minus zero points, in the weight's dtype. scale [..., out, groups]: the scales to start from. A scale changes only if that lowers
    (w − ŵ)H(w − ŵ)ᵀ, and only to a number of the same sign that the dtype `stored` can hold.
    """
    groups = scale.shape[-1]
    width = weight.shape[-1] // groups
    damped = damping[..., None, None]
    scale = scale.clone()
    lost = weight - (steps.view(*scale.shape, width) * scale[..., None]).view_as(weight)
    pulled = (lost @ gram).add_(lost * damped)  # (w − ŵ)H
    for _ in range(sweeps):
        for group in range(groups):
            here = slice(group * width, (group + 1) * width)
            step = steps[..., here]
            spread = step @ gram[..., here, :]  # how the error of every input changes with the scale
            spread[..., here] += damped * step
            curve = (spread[..., here] * step).sum(-1)
            slope = (pulled[..., here] * step).sum(-1)
            best = (scale[..., group] + slope / curve.clamp(min=1e-30)).to(stored).to(scale.dtype)
            moved = best - scale[..., group]
            moved = torch.where(
                (best * scale[..., group] > 0) & (moved * (moved * curve - 2 * slope) < 0),
                moved,
                torch.zeros_like(moved),
            )
            scale[..., group] += moved
            pulled -= spread.mul_(moved[..., None])
    return scale
