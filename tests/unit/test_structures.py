"""The order in which units are removed, and its errors: those of a refit by least squares, found by trying every unit."""

import pytest
import torch
from torch import Tensor

from nightpress.core.compress.solvers.structures import removal
from nightpress.core.compress.solvers.units import Known, columns_of, compensated

_TOKENS = 300


def _layer(units: int, width: int, out: int = 5) -> tuple[Tensor, Tensor]:
    """Inputs [tokens, in] that depend on each other, and a weight [out, in], float64."""
    generator = torch.Generator().manual_seed(units)
    columns = units * width
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(_TOKENS, columns, generator=generator, dtype=torch.float64) @ mixing
    return inputs, torch.randn(out, columns, generator=generator, dtype=torch.float64)


def _refitted(inputs: Tensor, weight: Tensor, kept: list[int], width: int) -> float:
    """The smallest error that any weight for the kept units has, as a share of the output's power."""
    wanted = inputs @ weight.T
    columns = columns_of(torch.tensor(kept, dtype=torch.int64), width)
    left = wanted
    if kept:
        left = wanted - inputs[:, columns] @ torch.linalg.lstsq(inputs[:, columns], wanted).solution
    return float(left.square().sum() / wanted.square().sum())


@pytest.mark.parametrize(("units", "width"), [(4, 3), (9, 1), (30, 1), (12, 2)])
def test_each_removal_is_the_best_one_and_costs_what_a_refit_loses(units: int, width: int):
    inputs, weight = _layer(units, width)
    before = weight.clone()
    found = removal(weight, inputs.T @ inputs / _TOKENS, width, damping=1e-13)
    assert torch.equal(weight, before)  # the caller's weight stays as it is
    kept = list(range(units))
    for step in range(units):
        costs = {unit: _refitted(inputs, weight, [other for other in kept if other != unit], width) for unit in kept}
        chosen = int(found.order[step])
        assert costs[chosen] == pytest.approx(min(costs.values()), rel=1e-6, abs=1e-9)
        assert float(found.errors[step + 1]) == pytest.approx(costs[chosen], rel=1e-6, abs=1e-9)
        kept.remove(chosen)
    assert sorted(found.order.tolist()) == list(range(units))
    assert found.errors[0] == 0
    assert float(found.errors[-1]) == pytest.approx(1)


def test_the_weights_that_are_kept_reach_the_error_that_was_told():
    inputs, weight = _layer(8, 2)
    found = removal(weight, inputs.T @ inputs / _TOKENS, 2, damping=1e-13)
    stays, goes = found.order[5:].sort().values, found.order[:5].sort().values
    known = Known(inputs.T @ inputs / _TOKENS, inputs.mean(0))
    fitted, _ = compensated(weight, None, known, columns_of(stays, 2), columns_of(goes, 2), 1e-13)
    wanted = inputs @ weight.T
    error = (wanted - inputs[:, columns_of(stays, 2)] @ fitted.T).square().sum() / wanted.square().sum()
    assert float(error) == pytest.approx(float(found.errors[5]), rel=1e-6)


def test_a_layer_that_reads_only_zeros_loses_nothing():
    found = removal(torch.ones(3, 4), torch.zeros(4, 4), 2, damping=0.01)
    assert found.errors.tolist() == [0, 0, 0]
