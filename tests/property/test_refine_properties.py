"""Properties that hold for any weight and any inputs.

No row ends worse than rounding to nearest, refitted scales never cost more, and budgets are spent in the best way.
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nightpress.core.compress.grids.grid import Grid
from nightpress.core.compress.grids.ranges import find_ranges, half_quadratic
from nightpress.core.compress.grids.refine import fit_scales
from nightpress.core.compress.grids.rounding import nearest_codes, nearest_floats
from nightpress.core.compress.grids.stored import dequantized, from_tensors, round_weight, to_tensors
from nightpress.core.compress.solvers.gptq import round_obs
from nightpress.core.compress.solvers.knapsack import choose
from nightpress.core.compress.solvers.obs import Quantize, factorize, output_loss, solve
from nightpress.core.recipes.schemes import Scheme


def _draw(seed: int, rows: int, columns: int, tokens: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs


def _loss(weight: Tensor, after: Tensor, gram: Tensor, damping: float) -> Tensor:
    """(w − q)(H + λI)(w − q)ᵀ of each row [out], in float64."""
    lost = (weight - after).double()
    return ((lost @ gram.double()) * lost).sum(1) + damping * lost.square().sum(1)


shapes = {
    "seed": st.integers(0, 2**31),
    "rows": st.integers(1, 10),
    "groups": st.integers(1, 4),
    "tokens": st.integers(1, 200),  # fewer than columns: a Gram matrix of low rank
}


@settings(max_examples=60)
@given(
    **shapes,
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    by_power=st.booleans(),
    ranges=st.sampled_from(["extremes", "least-error", "half-quadratic"]),
    refine=st.booleans(),
)
@pytest.mark.slow
def test_no_row_costs_the_outputs_more_than_rounded_to_nearest(
    seed: int,
    rows: int,
    groups: int,
    tokens: int,
    bits: int,
    symmetric: bool,
    by_power: bool,
    ranges: str,
    refine: bool,
):
    weight, gram = _draw(seed, rows, 32 * groups, tokens)
    scheme = Scheme(bits, strategy="group", group_size=32, symmetric=symmetric)
    factor = factorize(gram, by_power=by_power)
    coded = round_obs(weight, gram, factor, scheme, torch.bfloat16, ranges=ranges, refine=refine)
    importance = factor.power if ranges == "least-error" else None
    nearest = round_weight(weight, scheme, torch.bfloat16, ranges=ranges, importance=importance)
    ours, theirs = (_loss(weight, dequantized(codes, scheme), gram, factor.damping) for codes in (coded, nearest))
    assert bool((ours <= theirs * (1 + 1e-3) + 1e-6).all())  # the solver factors the Gram matrix in float32
    top = 2 ** (bits - 1)
    assert -top <= int(coded.codes.min()) <= int(coded.codes.max()) < top


@settings(max_examples=40)
@given(**shapes, symmetric=st.booleans())
@pytest.mark.slow
def test_fitted_scales_never_cost_more(seed: int, rows: int, groups: int, tokens: int, symmetric: bool):
    weight, gram = (tensor.double() for tensor in _draw(seed, rows, 32 * groups, tokens))
    factor = factorize(gram)
    solved = solve(weight, factor, Quantize(Grid(3, 32, symmetric), torch.bfloat16))
    assert solved.codes is not None
    assert solved.scale is not None
    steps = solved.codes.double().view(rows, groups, 32)
    if solved.zero_point is not None:
        steps = steps - solved.zero_point[..., None]
    before = solved.scale.double()
    after = fit_scales(
        weight, gram, steps.reshape(weight.shape), before, torch.bfloat16, damping=factor.damping, sweeps=2
    )
    assert torch.equal(after, after.bfloat16().double())
    losses = [
        output_loss(weight, (steps * scales[..., None]).reshape(weight.shape), factor) for scales in (before, after)
    ]
    assert bool((losses[1] <= losses[0] * (1 + 1e-9)).all())


def test_one_fitted_scale_is_the_least_squares_one():
    weight, gram = (tensor.double() for tensor in _draw(3, 5, 32, 400))
    factor = factorize(gram)
    steps = torch.randint(-4, 4, (5, 32)).double()
    found = fit_scales(weight, gram, steps, torch.full((5, 1), 0.01).double(), torch.float64, damping=factor.damping)
    damped = gram + factor.damping * torch.eye(32).double()
    exact = ((weight @ damped) * steps).sum(1) / ((steps @ damped) * steps).sum(1)
    positive = exact > 0
    torch.testing.assert_close(found[positive, 0], exact[positive])


@settings(max_examples=40)
@given(seed=st.integers(0, 2**31), bits=st.sampled_from([2, 3, 4]), symmetric=st.booleans())
@pytest.mark.slow
def test_half_quadratic_ranges_are_never_worse_than_the_extremes_in_their_norm(seed: int, bits: int, symmetric: bool):
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(seed)) ** 3
    grid = Grid(bits, 32, symmetric)

    def error(scale: Tensor, zero_point: Tensor) -> Tensor:
        steps = nearest_codes(weight, scale, zero_point, grid).view(6, 2, 32) - zero_point[..., None]
        return (weight.view(6, 2, 32) - steps * scale[..., None]).abs().pow(0.7).sum(2)

    found, extremes = half_quadratic(weight, grid, torch.float16), find_ranges(weight, grid, torch.float16)
    assert bool((error(*found) <= error(*extremes) * (1 + 1e-4)).all())
    assert torch.equal(found[0], found[0].half().float())


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 140),
    scheme=st.sampled_from(
        [
            Scheme(8, "float"),
            Scheme(8, "float", "block"),
            Scheme(8, "float", "tensor"),
            Scheme(4, "float", "group", 32),
            Scheme(4, "float", "group", 16),
        ]
    ),
    magnitude=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_floats_come_back_as_they_were_written_and_near(seed: int, rows: int, scheme: Scheme, magnitude: float):
    weight = torch.randn(rows, 128, generator=torch.Generator().manual_seed(seed)) * magnitude
    coded = round_weight(weight, scheme, torch.float32, largest=float(weight.abs().max()))
    written = to_tensors("a.weight", scheme, coded)
    again = from_tensors("a.weight", scheme, written)
    assert torch.equal(again, dequantized(coded, scheme))
    assert float((again - weight).norm() / weight.norm()) < (0.05 if scheme.bits == 8 else 0.2)


def test_the_largest_weight_of_nvfp4_never_takes_its_groups_scale_past_the_largest_float():
    """Rounding in float32 once exceeded it, and gave NaN, for about one weight in 50."""
    scheme = Scheme(4, "float", "group", 16)
    for seed in range(500):
        weight = torch.randn(1, 16, generator=torch.Generator().manual_seed(seed))
        coded = round_weight(weight, scheme, torch.float32, largest=float(weight.abs().max()))
        assert float(coded.scale.float()) == 448


@given(st.lists(st.floats(-500, 500), min_size=1, max_size=20), st.sampled_from([4, 8]))
@pytest.mark.slow
def test_no_float_of_the_grid_is_nearer(values: list[float], bits: int):
    given_values = torch.tensor(values)
    if bits == 4:
        numbers = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])
    else:
        every = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        numbers = every[every.isfinite()]
    numbers = torch.cat([numbers, -numbers])
    nearest = (given_values[:, None] - numbers).abs().amin(1)
    torch.testing.assert_close((nearest_floats(given_values, bits) - given_values).abs(), nearest)


@settings(max_examples=60)
@given(st.data())
@pytest.mark.slow
def test_the_choice_is_the_best_that_fits(data: st.DataObject):
    items = data.draw(st.integers(1, 6))
    sizes = data.draw(st.lists(st.lists(st.integers(1, 40), min_size=3, max_size=3), min_size=items, max_size=items))
    errors = data.draw(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=items, max_size=items))
    least = sum(min(size) for size in sizes)
    budget = data.draw(st.integers(least, least + 60))
    picked = choose(sizes, errors, budget)
    assert sum(size[at] for size, at in zip(sizes, picked, strict=True)) <= budget
    best = min(
        sum(error[at] for error, at in zip(errors, every, strict=True))
        for every in itertools.product(range(3), repeat=items)
        if sum(size[at] for size, at in zip(sizes, every, strict=True)) <= budget
    )
    assert sum(error[at] for error, at in zip(errors, picked, strict=True)) == pytest.approx(best, abs=1e-9)


def test_a_budget_below_the_smallest_is_refused():
    with pytest.raises(ValueError, match="the budget is 3"):
        choose([[2, 4], [2, 4]], [[1.0, 0.5], [1.0, 0.5]], 3)
