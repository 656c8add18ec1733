"""SmoothQuant, compared with a simple float64 version of the paper; and its search, compared with trying all values."""

import pytest
import torch
from torch import Tensor

from nightpress.core.compress.grids.grid import Grid
from nightpress.core.compress.solvers.smooth import (
    Rounded,
    SmoothLayer,
    Strengths,
    input_scale,
    round_inputs,
    rounded_outputs,
    search_factors,
    smoothing_factors,
)

INT8, FP8 = Grid(8), Grid(8, kind="float")


def _draw(outliers: float = 30.0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    inputs = torch.randn(400, 24)
    inputs[:, ::7] *= outliers
    return inputs, torch.randn(16, 24)


def _published(inputs: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """Equation 4 of the SmoothQuant paper (arXiv 2211.10438)."""
    x, w = inputs.double(), weight.double()
    return torch.stack([x[:, j].abs().max() ** alpha / w[:, j].abs().max() ** (1 - alpha) for j in range(x.shape[1])])


def test_factors_are_the_papers():
    inputs, weight = _draw()
    for alpha in (0.0, 0.3, 0.5, 1.0):
        factors = smoothing_factors(inputs.abs().amax(0), weight, alpha)
        torch.testing.assert_close(factors.double(), _published(inputs, weight, alpha), rtol=1e-5, atol=0)


def test_the_product_stays_the_same_and_a_silent_input_keeps_its_column():
    inputs, weight = _draw()
    inputs[:, 3] = 0
    factors = smoothing_factors(inputs.abs().amax(0), weight, 0.5)
    assert factors[3] == 1
    torch.testing.assert_close((inputs / factors) @ (weight * factors).T, inputs @ weight.T, rtol=1e-4, atol=1e-3)


def test_heads_that_share_values_share_factors():
    inputs, weight = _draw()
    factors = smoothing_factors(inputs.abs().amax(0), weight, 0.5, share=(2, 4))  # 2 heads · 3 repeats · 4
    grouped = factors.view(2, 3, 4)
    assert bool((grouped == grouped[:, :1]).all())


def test_strengths_are_those_of_all_batches():
    inputs, _ = _draw()
    strengths = Strengths(24, "cpu", gram=True)
    for batch in inputs.split(90):
        strengths.add(batch[None])
    assert torch.equal(strengths.largest, inputs.abs().amax(0))
    assert strengths.tokens == 400
    assert strengths.gram is not None
    torch.testing.assert_close(strengths.gram.matrix(), inputs.T @ inputs, rtol=1e-4, atol=1e-2)
    rows = {tuple(group.tolist()) for group in inputs}
    assert all(tuple(row.tolist()) in rows for row in strengths.sample())


def test_int8_and_fp8_inputs_are_rounded_as_in_float64():
    inputs, _ = _draw()
    scale = input_scale(inputs, INT8)  # one scale per token
    exact = inputs.double().abs().amax(1, keepdim=True) / 127.5
    expected = (inputs.double() / exact).round().clamp(-128, 127) * exact
    found = round_inputs(inputs, scale, INT8).double()
    # The largest value of a token lies between two codes, and may round to either.
    assert float(((found - expected).abs() > exact * 1e-3).double().mean()) < 0.03
    floats = round_inputs(inputs, input_scale(inputs, FP8), FP8)
    assert float(((floats - inputs).abs() / inputs.abs()).max()) < 2**-3
    assert bool(((floats - inputs).abs() <= inputs.abs() * 2**-4 + input_scale(inputs, FP8) * 2**-10).all())


@pytest.mark.parametrize("rounded", ["token", "static", None])
def test_the_search_finds_what_costs_the_outputs_least(rounded: Rounded):
    inputs, weight = _draw()
    largest, exact = inputs.abs().amax(0), inputs @ weight.T

    def loss(factors: Tensor) -> float:
        return float((rounded_outputs(inputs, largest, weight, factors, INT8, rounded) - exact).square().sum())

    found = loss(search_factors([SmoothLayer(weight, inputs, largest, rounded)], INT8))
    for step in range(21):
        assert found <= loss(smoothing_factors(largest, weight, step / 20)) * (1 + 1e-6)
    # The inputs have outliers, so smoothing gains much.
    assert found < (0.7 if rounded is None else 0.5) * loss(torch.ones(24))
