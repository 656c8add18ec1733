"""SmoothQuant: move magnitude from a layer's inputs into its weights, so that 8 bits are enough for both.

Xiao et al., SmoothQuant (arXiv 2211.10438), eq. 4: inputs are divided, and columns multiplied, by s_j = max|X_j|^α / max|W_j|^(1−α).
"""

from collections.abc import Sequence
from itertools import chain
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from nightpress.core.compress.grids.grid import Grid
from nightpress.core.compress.grids.ranges import find_ranges
from nightpress.core.compress.grids.rounding import nearest_codes, nearest_floats
from nightpress.core.compress.ranks.group import ALONE, Group
from nightpress.core.compress.solvers.gram import Gram
from nightpress.core.compress.solvers.products import fast_products
from nightpress.core.compress.solvers.samples import EvenSample

_EXPONENTS = tuple(step / 20 for step in range(21))
_ROWS = 4096  #: rows of a weight, evenly spaced, that the search uses


class Strengths:
    """The running largest magnitude of each input, a sample of the tokens and, with `gram`, the Gram matrix."""

    def __init__(self, columns: int, device: torch.device | str, *, gram: bool) -> None:
        self.largest = torch.zeros(columns, device=device)
        self.gram = Gram(columns, device) if gram else None
        self.tokens = 0
        self._sample = EvenSample()

    def add(self, inputs: Tensor) -> None:
        """Add inputs [..., columns], of any float dtype."""
        x = inputs.reshape(-1, inputs.shape[-1])
        torch.maximum(self.largest, x.abs().amax(0).float(), out=self.largest)
        self._sample.add(x)
        self.tokens += len(x)
        if self.gram is not None:
            self.gram.add(x)

    def combine(self, group: Group) -> None:
        """Add what the other processes have added."""
        self.tokens = group.total(self.tokens)
        group.largest(self.largest)
        self._sample.combine(group, self.largest.device)
        if self.gram is not None:
            self.gram.combine(group)

    def is_finite(self) -> bool:
        """Whether all inputs and their sums are finite."""
        return bool(torch.isfinite(self.largest).all()) and (self.gram is None or self.gram.is_finite())

    def sample(self) -> Tensor:
        """A sample [tokens, columns] float32, evenly spaced over all tokens."""
        return self._sample.tokens().float() if self.tokens else self.largest.new_zeros(0, len(self.largest))


def smoothing_factors(largest: Tensor, weight: Tensor, alpha: float, *, share: tuple[int, int] = (1, 1)) -> Tensor:
    """Return the factors [in] > 0 of eq. 4, by which inputs are divided. The factor is 1 for an input that was always zero.

    largest [in]: the inputs' largest magnitudes; weight [out, in].
    share (heads, width): columns are heads · repeats · width. All repeats of a head get the same factors, as grouped-query attention needs.
    """
    inputs, weights = _shared(largest, share), _shared(weight.abs().amax(0), share)
    factors = inputs.clamp(min=1e-5) ** alpha / weights.clamp(min=1e-5) ** (1 - alpha)
    return torch.where(inputs > 0, factors.clamp(1e-5, 1e5), torch.ones_like(factors))


#: How inputs are rounded: with one scale for each token, with one scale for all tokens, or not at all (None: they stay in float).
Rounded = Literal["token", "static"] | None


class SmoothLayer(NamedTuple):
    """Layers that read the inputs to be scaled: all tokens, or the tokens that a router sends to these layers."""

    weight: Tensor  #: [out, in] float32, the weights of all these layers, stacked along the rows
    sample: Tensor  #: [tokens, in] float32, a sample of the tokens that the layers were calibrated with
    largest: Tensor  #: [in], largest magnitudes over all those tokens
    inputs: Rounded
    tokens: float = 1.0  #: number of tokens that are routed to the layers


def search_factors(
    layers: Sequence[SmoothLayer],
    grid: Grid,
    *,
    share: tuple[int, int] = (1, 1),
    group: Group = ALONE,
    holders: Group = ALONE,
) -> Tensor:
    """Return the factors [in] with the least output error over all layers, inputs and weights rounded: those of some α, or all 1.

    group: processes with the same layers, which share out the candidates. holders: processes with different layers of the same place.
    """
    rows = holders.total(sum(len(layer.weight) for layer in layers))
    looked_at = [layer._replace(weight=layer.weight[:: -(-rows // _ROWS)]) for layer in layers if layer.tokens]
    largest = torch.stack([layer.largest for layer in layers]).amax(0)
    heaviest = torch.stack([layer.weight.abs().amax(0) for layer in layers]).amax(0, keepdim=True)
    holders.largest(largest)
    holders.largest(heaviest)
    tried = [torch.ones_like(largest)]
    tried += [smoothing_factors(largest, heaviest, alpha, share=share) for alpha in _EXPONENTS]
    with fast_products():
        exact = [layer.sample @ layer.weight.T for layer in looked_at]
        own = [
            sum(
                layer.tokens / max(1, len(layer.sample)) * _loss(layer, factors, grid, outputs)
                for layer, outputs in zip(looked_at, exact, strict=True)
            )
            for factors in tried[group.share(len(tried))]
        ]
    best, least = tried[0], float("inf")
    losses = [sum(of_all) for of_all in zip(*holders.collect(own), strict=True)]
    for factors, loss in zip(tried, chain.from_iterable(group.collect(losses)), strict=True):
        if loss < least:
            best, least = factors, loss
    return best


def _loss(layer: SmoothLayer, factors: Tensor, grid: Grid, exact: Tensor) -> float:
    outputs = rounded_outputs(layer.sample, layer.largest, layer.weight, factors, grid, layer.inputs)
    return float((outputs - exact).square().sum())


def rounded_outputs(
    inputs: Tensor, largest: Tensor, weight: Tensor, factors: Tensor, grid: Grid, rounded: Rounded
) -> Tensor:
    """The outputs [tokens, out] of a layer with 8-bit weights, whose columns are multiplied by the factors before they are rounded.

    inputs [tokens, in] are divided by the factors [in] and then rounded as `rounded` says. largest [in] gives the scale for `static`.
    """
    scaled = inputs / factors
    if rounded is not None:
        scale = input_scale(largest / factors, grid) if rounded == "static" else input_scale(scaled, grid)
        scaled = round_inputs(scaled, scale, grid)
    return scaled @ _rounded(weight * factors, grid).T


def input_scale(inputs: Tensor, grid: Grid) -> Tensor:
    """The smallest scale [..., 1] whose grid reaches the largest magnitude of inputs [..., in]."""
    return inputs.abs().amax(-1, keepdim=True).clamp(min=1e-10) / grid.reach


def round_inputs(inputs: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Round inputs [..., in] to 8 bits. Returns floats."""
    steps = inputs / scale
    if grid.kind == "float":
        return nearest_floats(steps, grid.bits) * scale
    return steps.round_().clamp_(-grid.top, grid.top - 1) * scale


def _rounded(weight: Tensor, grid: Grid) -> Tensor:
    scale, zero_point = find_ranges(weight, grid, torch.float32)
    return nearest_codes(weight, scale, zero_point, grid) * scale


def _shared(values: Tensor, share: tuple[int, int]) -> Tensor:
    heads, width = share
    if heads * width in (1, len(values)):
        return values
    grouped = values.view(heads, -1, width)
    return grouped.amax(1, keepdim=True).expand_as(grouped).reshape(-1)
