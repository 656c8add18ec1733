"""The mathematics of removing units from a layer, compared with direct computations."""

import pytest
import torch
from torch import Tensor

from nightpress.core.compress.solvers.units import (
    Known,
    Moments,
    columns_of,
    compensated,
    output_losses,
    shares,
    smallest,
    weight_norms,
)
from nightpress.core.errors import ErrorCode, NightpressError


def known_of(inputs: Tensor, *, centred: bool) -> Known:
    moments = Moments(inputs.shape[1], "cpu")
    for part in torch.split(inputs, 50):
        moments.add(part)
    assert moments.tokens == len(inputs)
    return moments.finish(centred=centred)


def inputs_of(columns: int = 24, tokens: int = 400) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(tokens, 8, generator=generator) @ torch.randn(8, columns, generator=generator)
    return mixed + 0.3 * torch.randn(tokens, columns, generator=generator) + torch.arange(columns) / 10


def test_moments_are_those_of_all_tokens():
    x = inputs_of()
    assert torch.allclose(known_of(x, centred=False).second, x.T @ x / len(x), atol=1e-3)
    assert torch.allclose(known_of(x, centred=True).second, torch.cov(x.T, correction=0), atol=1e-3)
    assert torch.allclose(known_of(x, centred=True).mean, x.mean(0), atol=1e-4)


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("centred", [True, False])
def test_a_units_loss_is_what_the_output_loses_without_it(width: int, centred: bool):
    x, weight = inputs_of(), torch.randn(7, 24, generator=torch.Generator().manual_seed(1))
    found = output_losses(weight, known_of(x, centred=centred), width)
    for unit in range(24 // width):
        at = columns_of(torch.tensor([unit]), width)
        seen = x[:, at] - (x[:, at].mean(0) if centred else 0)
        assert float(found[unit]) == pytest.approx(float((seen @ weight[:, at].T).square().sum(1).mean()), rel=1e-3)


@pytest.mark.parametrize("biased", [True, False])
def test_what_stays_is_fitted_as_least_squares_would(biased: bool):
    x, weight = inputs_of(), torch.randn(7, 24, generator=torch.Generator().manual_seed(1))
    bias = torch.randn(7, generator=torch.Generator().manual_seed(2)) if biased else None
    stays, goes = torch.arange(0, 18), torch.arange(18, 24)
    new, new_bias = compensated(weight, bias, known_of(x, centred=biased), stays, goes, 1e-7)
    wanted = x @ weight.T + (bias if bias is not None else 0)
    design = torch.cat([x[:, stays], torch.ones(len(x), 1)], 1) if biased else x[:, stays]
    best = design @ torch.linalg.lstsq(design, wanted).solution
    ours = x[:, stays] @ new.T + (new_bias if new_bias is not None else 0)
    cut = x[:, stays] @ weight[:, stays].T + (bias if bias is not None else 0)
    error = [float((weight - wanted).norm()) for weight in (best, ours, cut)]
    assert error[1] == pytest.approx(error[0], rel=1e-2)
    assert error[1] < 0.5 * error[2]


def test_units_that_put_nothing_out_cost_nothing_and_break_nothing():
    x, weight = torch.zeros(10, 6), torch.randn(3, 6)
    new, _ = compensated(weight, None, known_of(x, centred=False), torch.arange(4), torch.arange(4, 6), 0.01)
    assert torch.equal(new, weight[:, :4])


def test_moments_that_no_damping_makes_definite_are_an_error_and_no_silent_cut():
    x, weight = inputs_of(6), torch.randn(3, 6)
    known = known_of(x, centred=False)
    known.second[0, 1] = known.second[1, 0] = 1e9
    with pytest.raises(NightpressError, match="positive definite") as caught:
        compensated(weight, None, known, torch.arange(4), torch.arange(4, 6), 0.01)
    assert caught.value.code == ErrorCode.NUMERICAL_FAILURE


def test_of_equal_scores_the_last_go_and_both_lists_ascend():
    stays, goes = smallest(torch.tensor([1.0, 3.0, 1.0, 1.0, 2.0]), 3)
    assert stays.tolist() == [0, 1, 4]
    assert goes.tolist() == [2, 3]


def test_norms_add_up_over_all_that_belongs_to_a_unit():
    parts = [torch.tensor([[1.0, -2.0], [3.0, 0.0]]), torch.tensor([[-1.0], [2.0]])]
    assert weight_norms(parts, 1).tolist() == [4, 5]
    assert weight_norms(parts, 2).tolist() == [6, 13]


@pytest.mark.parametrize("step", [1, 4, 5])
def test_a_global_share_takes_the_cheapest_steps_and_leaves_one_in_every_layer(step: int):
    generator = torch.Generator().manual_seed(3)
    scores = [torch.rand(24, generator=generator) * scale for scale in (0.001, 1, 2)]
    kept = shares(scores, 0.4, step)
    assert sum(24 - count for count in kept) == pytest.approx(0.4 * 72, abs=step)
    assert kept[0] == (step if 24 % step == 0 else min(kept))
    assert kept[0] <= kept[1]
    assert kept[2] >= kept[1] - step
    assert all(count >= step for count in kept)
    assert min(shares(scores, 0.99, step)) >= step
