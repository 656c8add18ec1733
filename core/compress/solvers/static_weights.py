"""Static int8: find the smoothing factors and codes with the least output error, for all weights that read one input."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nightpress.core.compress.grids import activation_ranges
from nightpress.core.compress.grids.grid import Grid
from nightpress.core.compress.solvers.obs import Quantize, factorize, solve
from nightpress.core.compress.solvers.smooth import smoothing_factors

_ROWS = 512  #: rows of a weight, evenly spaced, that the search for factors uses
_COARSE, _FINE = 0.1, 0.05  #: steps of the exponent α: over its whole range, then around the best value


@dataclass(frozen=True)
class StaticWeight:
    """The weights [out, in] of all products that read one input, as int8."""

    factors: Tensor  #: [in]; the input is divided by these, and the weights' columns are multiplied by them
    codes: NDArray[np.int8]  #: [out, in]
    scales: NDArray[np.float32]  #: [out]
    error: NDArray[np.float32]  #: [out], Σ of the squared output errors on the sample, with input and weight rounded
    power: NDArray[np.float32]  #: [out], Σ of the squared outputs on the sample


def settle(
    weight: Tensor, gram: Tensor, sample: Tensor, low: Tensor, high: Tensor, *, tokens: int, bits: int
) -> StaticWeight:
    """Search the factors, then round the weight; each column compensates for the errors of earlier columns (GPTQ, arXiv 2210.17323).

    weight [out, in] float32; gram [in, in] = Σ xxᵀ over `tokens` tokens; sample [T, in]; low, high [in]: each channel's extremes.
    Codes have `bits` bits. The variance of the input's rounding error, step²/12 for each channel and token, is added to the Gram matrix, so
    that the codes are chosen for the rounded input.
    """
    factors = _search(weight, sample, low, high, bits)
    step = float(activation_ranges.scale_and_zero(_range(low, high, factors))[0])
    inputs = gram / factors[:, None] / factors[None, :]
    inputs.diagonal().add_(tokens * step**2 / 12)
    # Settle strong channels first: the many weak channels can compensate for them, but not the other way round.
    solved = solve(weight * factors, factorize(inputs, by_power=True), Quantize(Grid(bits), torch.float32))
    assert solved.codes is not None
    assert solved.scale is not None
    exact = sample @ weight.T
    error = _rounded(sample / factors, _range(low, high, factors)) @ (solved.codes * solved.scale).T - exact
    return StaticWeight(
        factors,
        solved.codes.numpy(),
        solved.scale[:, 0].numpy(),
        error.square().sum(0).numpy(),
        exact.square().sum(0).numpy(),
    )


def _search(weight: Tensor, sample: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Return the factors [in] with the least output error, from several values of α and from no smoothing.

    Inputs and weights are rounded as the graph will round them.
    """
    rows = weight[:: -(-len(weight) // _ROWS)]
    largest, heaviest = torch.maximum(-low, high), weight
    exact = sample @ rows.T

    def factors_of(alpha: float) -> Tensor:
        return smoothing_factors(largest, heaviest, alpha)

    def loss(factors: Tensor) -> float:
        inputs = _rounded(sample / factors, _range(low, high, factors))
        return float((inputs @ _nearest(rows * factors, bits).T - exact).square().sum())

    none = torch.ones_like(largest)
    tried = {alpha: loss(factors_of(alpha)) for alpha in (step * _COARSE for step in range(11))}
    middle = min(tried, key=lambda alpha: tried[alpha])
    for alpha in (middle - _FINE, middle + _FINE):
        if 0 <= alpha <= 1:
            tried[alpha] = loss(factors_of(alpha))
    best = min(tried, key=lambda alpha: tried[alpha])
    return factors_of(best) if tried[best] < loss(none) else none


def _range(low: Tensor, high: Tensor, factors: Tensor) -> activation_ranges.Range:
    return float((low / factors).min()), float((high / factors).max())


def _rounded(values: Tensor, found: activation_ranges.Range) -> Tensor:
    """Round values to the uint8 grid over a range. Returns floats."""
    scale, zero = (float(part) for part in activation_ranges.scale_and_zero(found))
    return ((values / scale).round_() + zero).clamp_(0, activation_ranges.LEVELS - 1).sub_(zero).mul_(scale)


def _nearest(weight: Tensor, bits: int) -> Tensor:
    """Round a weight [out, in] to `bits` bits with one scale for each row. Returns floats."""
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / (2 ** (bits - 1) - 0.5)
    return torch.round(weight / scale).mul_(scale)
