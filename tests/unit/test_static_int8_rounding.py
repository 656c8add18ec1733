"""The rounding of static int8: ranges that clip outliers where that costs least, and weights that make up for each other's errors."""

import numpy as np
import pytest
import torch

from nightpress.core.compress.graph.dynamic_int8 import codes_of
from nightpress.core.compress.grids import activation_ranges
from nightpress.core.compress.grids.activation_ranges import BINS, Histogram
from nightpress.core.compress.solvers.static_weights import settle


@pytest.mark.parametrize("bits", [7, 8])
def test_weights_make_up_for_each_others_rounding(bits: int):
    """The inputs have correlated channels, one of them with large values, like the outputs of norms in real encoders."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(2048, 12, generator=generator) @ torch.randn(12, 64, generator=generator)
    x = common + 0.2 * torch.randn(2048, 64, generator=generator)
    x[:, 5] *= 10
    weight = torch.randn(48, 64, generator=generator)
    low, high = x.amin(0).clamp(max=0), x.amax(0).clamp(min=0)
    found = settle(weight, x.T @ x, x[:256], low, high, tokens=len(x), bits=bits)
    top = 2 ** (bits - 1)
    assert -top <= found.codes.min() < found.codes.max() < top
    settled = torch.from_numpy(found.codes * found.scales[:, None]) / found.factors
    codes, scales = codes_of((weight * found.factors).numpy(), 1, top - 1)
    nearest = torch.from_numpy(codes * scales) / found.factors
    exact = x @ weight.T
    assert (x @ settled.T - exact).norm() < 0.7 * (x @ nearest.T - exact).norm()


def _seen(values: np.ndarray) -> Histogram:
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    return Histogram(low, high, activation_ranges.count(values.astype(np.float32), low, high))


def _error(values: np.ndarray, found: tuple[float, float]) -> float:
    scale, zero = activation_ranges.scale_and_zero(found)
    codes = np.clip(np.rint(values / scale) + zero, 0, 255)
    return float((((codes - zero) * scale - values) ** 2).mean())


@pytest.mark.slow
def test_outliers_are_clipped_where_that_costs_least():
    values = np.random.default_rng(0).standard_t(3, 200_000)
    seen = _seen(values)
    whole = activation_ranges.min_max(seen)
    for find in (
        activation_ranges.mse,
        activation_ranges.entropy,
        lambda histogram: activation_ranges.percentile(histogram, 99.9),
    ):
        low, high = find(seen)
        assert whole[0] <= low < 0 < high <= whole[1]
    assert _error(values, activation_ranges.mse(seen)) < 0.9 * _error(values, whole)
    covered = np.mean(
        (values >= activation_ranges.percentile(seen, 99.9)[0])
        & (values <= activation_ranges.percentile(seen, 99.9)[1])
    )
    assert 0.999 <= covered < 0.9999


def test_a_range_holds_zero_exactly_and_constant_inputs_break_nothing():
    for found in ((0.0, 0.0), (0.0, 3.0), (-2.0, 0.0), (-0.3, 5.0)):
        scale, zero = activation_ranges.scale_and_zero(found)
        assert scale > 0
        assert 0 <= zero <= 255
    for find in (activation_ranges.mse, activation_ranges.entropy):
        assert find(Histogram(0.0, 0.0, np.full(BINS, 1.0))) == (0.0, 0.0)
