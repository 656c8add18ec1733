"""The search for AWQ's scales."""

import torch

from nightpress.core.compress.grids.grid import Grid
from nightpress.core.compress.solvers.awq import AwqLayer, round_scaled, search_scales


def _loss(weight: torch.Tensor, factors: torch.Tensor, gram: torch.Tensor, grid: Grid) -> float:
    lost = weight - round_scaled(weight, factors, grid, torch.float32)
    return float(((lost @ gram) * lost).sum())


def test_strong_inputs_get_finer_steps_and_the_loss_falls():
    torch.manual_seed(0)
    weight, inputs = torch.randn(64, 128), torch.randn(500, 128)
    inputs[:, :4] *= 30
    gram, grid = inputs.T @ inputs, Grid(4, 32, symmetric=False)
    factors = search_scales([[AwqLayer(weight, gram, grid)]], torch.float32)[0]
    assert float(factors[:4].min()) > float(factors[4:].max())
    assert _loss(weight, factors, gram, grid) < 0.5 * _loss(weight, torch.ones(128), gram, grid)


def test_where_nothing_is_gained_everything_stays():
    weight = torch.randint(-7, 8, (16, 64)).float()
    weight[:, ::16] = 7.5  # the step of every group is 1, so its other weights are grid points
    weight[:, 1::16] = -7.5
    factors = search_scales([[AwqLayer(weight, torch.eye(64), Grid(8, 16))]], torch.float32)[0]
    assert bool((factors > 0).all())
    assert _loss(weight, factors, torch.eye(64), Grid(8, 16)) <= _loss(
        weight, torch.ones(64), torch.eye(64), Grid(8, 16)
    )


def test_repeats_of_a_value_head_share_their_factors():
    torch.manual_seed(1)
    inputs = torch.randn(300, 2 * 3 * 8) * torch.rand(48) * 5  # 2 value heads of width 8, each read by 3 query heads
    layer = AwqLayer(torch.randn(32, 48), inputs.T @ inputs, Grid(4, 16))
    factors = search_scales([[layer]], torch.float32, share=(2, 8))[0]
    grouped = factors.view(2, 3, 8)
    torch.testing.assert_close(grouped, grouped[:, :1].expand_as(grouped))


def _experts(shares: tuple[float, float]) -> tuple[list[AwqLayer], torch.Tensor]:
    """Two experts whose tokens have large values in different input channels, and the factors found for both together."""
    torch.manual_seed(2)
    layers = []
    for share, strong in zip(shares, (slice(0, 4), slice(64, 68)), strict=True):
        inputs = torch.randn(400, 128)
        inputs[:, strong] *= 30
        layers.append(AwqLayer(torch.randn(48, 128), inputs.T @ inputs, Grid(4, 32), share))
    return layers, search_scales([layers], torch.float32)[0]


def test_experts_have_the_factors_that_cost_all_of_them_the_least():
    layers, factors = _experts((1.0, 1.0))
    plain = torch.ones(128)
    for layer in layers:
        assert _loss(layer.weight, factors, layer.gram, layer.grid) < 0.75 * _loss(
            layer.weight, plain, layer.gram, layer.grid
        )


def test_an_expert_counts_by_the_tokens_that_come_to_it():
    (first, second), evenly = _experts((1.0, 1.0))
    _, unevenly = _experts((1.0, 0.002))
    assert _loss(first.weight, unevenly, first.gram, first.grid) < _loss(first.weight, evenly, first.gram, first.grid)
    assert _loss(second.weight, unevenly, second.gram, second.grid) > _loss(
        second.weight, evenly, second.gram, second.grid
    )
    _, without = _experts((1.0, 0.0))
    assert float(without[64:68].max()) < float(without[:4].min())  # the router sent no token to the second expert


def test_places_are_searched_side_by_side_as_alone():
    torch.manual_seed(3)
    places = []
    for strong in (slice(0, 4), slice(32, 40), slice(60, 61)):
        inputs = torch.randn(300, 64)
        inputs[:, strong] *= 20
        places.append([AwqLayer(torch.randn(40, 64), inputs.T @ inputs, Grid(4, 32, symmetric=False))])
    together = search_scales(places, torch.float32)
    for place, factors in zip(places, together, strict=True):
        torch.testing.assert_close(factors, search_scales([place], torch.float32)[0])
