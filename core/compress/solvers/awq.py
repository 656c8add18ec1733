"""AWQ: scale a layer's inputs down and its columns up, where the inputs are strong, so that rounding spares what matters.

The published search runs the layer forward for every candidate. The error it measures, Σ ‖(W − Ŵ)x‖², is tr((W − Ŵ) H (W − Ŵ)ᵀ) with the
Gram matrix H, so one matrix product a candidate does it, whatever the number of tokens.

Lin et al., AWQ: Activation-aware Weight Quantization (arXiv 2306.00978), section 3.2.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nightpress.core.compress.grids.grid import Grid
from nightpress.core.compress.grids.ranges import find_ranges
from nightpress.core.compress.grids.rounding import nearest_codes
from nightpress.core.compress.solvers.products import fast_products

_EXPONENTS = tuple(step / 20 for step in range(21))
_ROWS = 4096  #: of a weight, evenly spread, that the search looks at: more don't change which candidate wins


class AwqLayer(NamedTuple):
    """Layers that take the inputs to be scaled: all tokens of them, or those that a router gives them."""

    weight: Tensor  #: [out, in] float32, of all the layers
    gram: Tensor  #: [in, in] float32, Σ xxᵀ of the tokens that they were shown
    grid: Grid
    share: float = 1.0  #: how many of those tokens come to them, of 1


def search_scales(layers: Sequence[AwqLayer], stored: torch.dtype, *, share: tuple[int, int] = (1, 1)) -> Tensor:
    """Factors [in] > 0 for the columns of all layers' weights, whose inputs are divided by them; all 1 where nothing is gained.

    The loss of each layer is summed over the tokens that come to it, so that an expert counts as often as it is asked.
    share (heads, width): columns are heads · repeats · width, and the repeats of a head get one factor, as grouped-query attention needs.
    """
    rows = sum(len(layer.weight) for layer in layers)
    looked_at = [layer._replace(weight=layer.weight[:: -(-rows // _ROWS)]) for layer in layers if layer.share]
    power = torch.stack([layer.gram.diagonal() * layer.share for layer in layers]).sum(0)
    magnitude = torch.stack([layer.weight.abs().mean(0) * (len(layer.weight) / rows) for layer in layers]).sum(0)
    inputs, weights = _shared(power.sqrt(), share), _shared(magnitude, share)
    inputs, weights = inputs / inputs.mean().clamp(min=1e-12), weights / weights.mean().clamp(min=1e-12)
    best, least = torch.ones_like(inputs), float("inf")
    for exponent in _EXPONENTS:
        for against in (0.0, 1.0) if exponent else (0.0,):
            factors = inputs.clamp(min=1e-4) ** exponent / weights.clamp(min=1e-4) ** (against * (1 - exponent))
            factors = factors / (factors.max() * factors.min()).sqrt()
            loss = sum(layer.share * _loss(layer, factors, stored) for layer in looked_at)
            if loss < least:
                best, least = factors, loss
    return best


def _loss(layer: AwqLayer, factors: Tensor, stored: torch.dtype) -> float:
    lost = layer.weight - round_scaled(layer.weight, factors, layer.grid, stored)
    with fast_products():
        return float(((lost @ layer.gram) * lost).sum())


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
