"""SmoothQuant: strength moves from a layer's inputs into its weights, until 8 bits hold both.

Xiao et al., SmoothQuant (arXiv 2211.10438), eq. 4: inputs are divided, and columns multiplied, by s_j = max|X_j|^α / max|W_j|^(1−α).
"""

import torch
from torch import Tensor

from core.compress.solvers.gram import Gram
from core.compress.solvers.grid import Grid
from core.compress.solvers.products import fast_products
from core.compress.solvers.ranges import find_ranges, nearest_codes, nearest_floats

_EXPONENTS = tuple(step / 20 for step in range(21))
_ROWS = 4096  #: of a weight, evenly spread, that the search looks at
_SAMPLE = 32  #: tokens of each batch that the search looks at


class Strengths:
    """The running largest magnitude of each input, some tokens as they are, and the Gram matrix if it is asked for."""

    def __init__(self, columns: int, device: torch.device | str, *, gram: bool) -> None:
        self.largest = torch.zeros(columns, device=device)
        self.gram = Gram(columns, device) if gram else None
        self.tokens = 0
        self._sample: list[Tensor] = []

    def add(self, inputs: Tensor) -> None:
        """Take in [..., columns], of any float dtype."""
        x = inputs.reshape(-1, inputs.shape[-1])
        torch.maximum(self.largest, x.abs().amax(0).float(), out=self.largest)
        self._sample.append(x[:: max(1, len(x) // _SAMPLE)][:_SAMPLE].clone())
        self.tokens += len(x)
        if self.gram is not None:
            self.gram.add(x)

    def sample(self) -> Tensor:
        """[tokens, columns] float32, evenly spread over what came."""
        return torch.cat(self._sample).float() if self._sample else self.largest.new_zeros(0, len(self.largest))


def smoothing_factors(largest: Tensor, weight: Tensor, alpha: float, *, share: tuple[int, int] = (1, 1)) -> Tensor:
    """Factors [in] > 0, by which inputs are divided, from their largest magnitudes [in] and the weight [out, in]; 1 for an input that never came.

    share (heads, width): columns are heads · repeats · width, and the repeats of a head get one factor, as grouped-query attention needs.
    """
    inputs, weights = _shared(largest, share), _shared(weight.abs().amax(0), share)
    factors = inputs.clamp(min=1e-5) ** alpha / weights.clamp(min=1e-5) ** (1 - alpha)
    return torch.where(inputs > 0, factors.clamp(1e-5, 1e5), torch.ones_like(factors))


def search_factors(
    sample: Tensor, largest: Tensor, weight: Tensor, grid: Grid, *, static: bool, share: tuple[int, int] = (1, 1)
) -> Tensor:
    """The factors, of all alphas' and none, with which rounded inputs [tokens, in] and rounded weights make the least output error."""
    looked_at = weight[:: -(-len(weight) // _ROWS)]
    tried = [torch.ones_like(largest)]
    tried += [smoothing_factors(largest, weight, alpha, share=share) for alpha in _EXPONENTS]
    best, least = tried[0], float("inf")
    with fast_products():
        exact = sample @ looked_at.T
        for factors in tried:
            loss = float(
                (rounded_outputs(sample, largest, looked_at, factors, grid, static=static) - exact).square().sum()
            )
            if loss < least:
                best, least = factors, loss
    return best


def rounded_outputs(
    inputs: Tensor, largest: Tensor, weight: Tensor, factors: Tensor, grid: Grid, *, static: bool
) -> Tensor:
    """What a layer of 8-bit weights and inputs puts out [tokens, out], its inputs divided by factors and its columns multiplied."""
    scaled = inputs / factors
    scale = input_scale(largest / factors, grid) if static else input_scale(scaled, grid)
    return round_inputs(scaled, scale, grid) @ _rounded(weight * factors, grid).T


def input_scale(inputs: Tensor, grid: Grid) -> Tensor:
    """The scale [..., 1] with which the largest magnitude [..., in] is just held."""
    return inputs.abs().amax(-1, keepdim=True).clamp(min=1e-10) / grid.reach


def round_inputs(inputs: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Inputs [..., in] rounded to 8 bits, as floats again."""
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
