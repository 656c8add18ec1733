"""AWQ: divide a layer's strong inputs by factors and multiply the weight's columns by them, so that these columns are rounded more finely.

The published search runs the layer forward for every candidate. The error that it measures, Σ ‖(W − Ŵ)x‖², equals
tr((W − Ŵ) H (W − Ŵ)ᵀ) with the Gram matrix H. So each candidate takes one matrix product, whatever the number of tokens.

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
_ROWS = 4096  #: rows of a weight, evenly spaced, that the search uses; more rows don't change which candidate wins


class AwqLayer(NamedTuple):
    """Layers that read the inputs to be scaled: all tokens, or the tokens that a router sends to these layers."""

    weight: Tensor  #: [out, in] float32, the weights of all these layers, stacked along the rows
    gram: Tensor  #: [in, in] float32, Σ xxᵀ of the tokens that the layers were calibrated with
    grid: Grid
    share: float = 1.0  #: share of those tokens that the router sends to the layers, 0 … 1


def search_scales(layers: Sequence[AwqLayer], stored: torch.dtype, *, share: tuple[int, int] = (1, 1)) -> Tensor:
    """Return the factors [in] > 0 with the least output error. They are all 1 if no candidate is better than that.

    All layers' columns are multiplied by the factors, and the inputs are divided by them. stored: the dtype of the scales. The loss of each
    layer is summed over the tokens that are routed to it, so that an expert counts as often as it is used.
    share (heads, width): columns are heads · repeats · width. All repeats of a head get the same factors, as grouped-query attention needs.
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
    """Multiply the columns of a weight [out, in] by factors [in], round to nearest, dequantize and divide by the factors again."""
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
