"""AWQ: scale a layer's inputs down and its columns up, where the inputs are strong, so that rounding spares what matters.

The published search runs the layer forward for every candidate. The error it measures, Σ ‖(W − Ŵ)x‖², is tr((W − Ŵ) H (W − Ŵ)ᵀ) with the
Gram matrix H, so one matrix product a candidate does it, whatever the number of tokens.

Lin et al., AWQ: Activation-aware Weight Quantization (arXiv 2306.00978), section 3.2.
"""

import torch
from torch import Tensor

from core.compress.solvers.grid import Grid
from core.compress.solvers.products import fast_products
from core.compress.solvers.ranges import find_ranges, nearest_codes

_EXPONENTS = tuple(step / 20 for step in range(21))
_ROWS = 4096  #: of a weight, evenly spread, that the search looks at: more don't change which candidate wins


def search_scales(
    weight: Tensor, gram: Tensor, grid: Grid, stored: torch.dtype, *, share: tuple[int, int] = (1, 1)
) -> Tensor:
    """Factors [in] > 0 for the columns of weight [out, in] float32, whose inputs are divided by them; all 1 where nothing is gained.

    share (heads, width): columns are heads · repeats · width, and the repeats of a head get one factor, as grouped-query attention needs.
    """
    looked_at = weight[:: -(-len(weight) // _ROWS)]
    inputs = _shared(gram.diagonal().sqrt(), share)
    weights = _shared(weight.abs().mean(0), share)
    inputs, weights = inputs / inputs.mean().clamp(min=1e-12), weights / weights.mean().clamp(min=1e-12)
    best, least = torch.ones_like(inputs), float("inf")
    for exponent in _EXPONENTS:
        for against in (0.0, 1.0) if exponent else (0.0,):
            factors = inputs.clamp(min=1e-4) ** exponent / weights.clamp(min=1e-4) ** (against * (1 - exponent))
            factors = factors / (factors.max() * factors.min()).sqrt()
            lost = looked_at - round_scaled(looked_at, factors, grid, stored)
            with fast_products():
                loss = float(((lost @ gram) * lost).sum())
            if loss < least:
                best, least = factors, loss
    return best


def round_scaled(weight: Tensor, factors: Tensor, grid: Grid, stored: torch.dtype) -> Tensor:
    """What is left of a weight whose columns are multiplied, rounded to nearest and divided again."""
    scaled = weight * factors
    scale, zero_point = find_ranges(scaled, grid, stored)
    codes = nearest_codes(scaled, scale, zero_point, grid)
    steps = codes.view(*scale.shape, -1) - zero_point[..., None]
    return (steps * scale[..., None]).view(weight.shape) / factors


def _shared(values: Tensor, share: tuple[int, int]) -> Tensor:
    heads, width = share
    if heads * width in (1, len(values)):
        return values
    grouped = values.view(heads, -1, width)
    return grouped.mean(1, keepdim=True).expand_as(grouped).reshape(-1)
