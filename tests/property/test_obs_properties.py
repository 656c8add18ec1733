"""Properties of the OBS solver that hold for any weight and any inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nightpress.core.compress.grids.grid import Grid
from nightpress.core.compress.grids.ranges import find_ranges
from nightpress.core.compress.grids.stored import dequantized, round_weight
from nightpress.core.compress.kernels.column_rules import BlockGrid, BlockMask
from nightpress.core.compress.kernels.obs_block import reference
from nightpress.core.compress.solvers.gptq import round_obs
from nightpress.core.compress.solvers.obs import Prune, Quantize, factorize, solve
from nightpress.core.recipes.schemes import Scheme


def _draw(seed: int, rows: int, columns: int, tokens: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator).double(), (inputs.T @ inputs).double()


sizes = {
    "seed": st.integers(0, 2**31),
    "rows": st.integers(1, 12),
    "groups": st.integers(1, 5),
    "group_size": st.sampled_from([16, 32, 64]),
    "tokens": st.integers(1, 300),  # fewer than columns: a Gram matrix of low rank
}


@settings(max_examples=60, derandomize=True)
@given(
    **sizes,
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    by_power=st.booleans(),
    search=st.booleans(),
    refine=st.booleans(),
)
@pytest.mark.slow
def test_codes_are_in_range_and_no_row_loses_more_than_by_rounding(
    seed: int,
    rows: int,
    groups: int,
    group_size: int,
    tokens: int,
    bits: int,
    symmetric: bool,
    by_power: bool,
    search: bool,
    refine: bool,
):
    """The solver alone is greedy: its last columns may be clipped, and cost more than all columns rounded to nearest."""
    weight, gram = (found.float() for found in _draw(seed, rows, groups * group_size, tokens))
    scheme = Scheme(bits, "int", "group", group_size, symmetric)
    ranges = "least-error" if search else "extremes"
    factor = factorize(gram.clone(), by_power=by_power)
    coded = round_obs(weight, gram, factor, scheme, torch.float32, ranges=ranges, refine=refine)
    top = 2 ** (bits - 1)
    assert int(coded.codes.min()) >= -top
    assert int(coded.codes.max()) <= top - 1
    nearest = round_weight(weight, scheme, torch.float32, ranges=ranges, importance=gram.diagonal())
    damped = gram.double() + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    solved_loss, nearest_loss = (
        ((lost @ damped) * lost).sum(1)
        for lost in (weight.double() - dequantized(found, scheme).double() for found in (coded, nearest))
    )
    assert bool((solved_loss <= nearest_loss * (1 + 1e-4)).all())


@settings(max_examples=40)
@given(**sizes, pattern=st.sampled_from([(2, 4), (1, 4), (3, 4), (4, 8), (1, 2)]), quantized=st.booleans())
@pytest.mark.slow
def test_a_pattern_leaves_exactly_so_many_of_every_group(
    seed: int, rows: int, groups: int, group_size: int, tokens: int, pattern: tuple[int, int], quantized: bool
):
    weight, gram = _draw(seed, rows, groups * group_size, tokens)
    how = Quantize(Grid(8, group_size), torch.float32) if quantized else None
    solved = solve(weight, factorize(gram), how, Prune(0.5, pattern))
    left = (solved.weight.view(rows, -1, pattern[1]) != 0).sum(2)
    assert int(left.max()) <= pattern[0]
    if not quantized:
        assert int(left.min()) == pattern[0]


@settings(max_examples=30)
@given(**sizes, sparsity=st.floats(0.05, 0.95))
@pytest.mark.slow
def test_unstructured_pruning_meets_its_share_in_every_block(
    seed: int, rows: int, groups: int, group_size: int, tokens: int, sparsity: float
):
    weight, gram = _draw(seed, rows, groups * group_size, tokens)
    solved = solve(weight, factorize(gram), prune=Prune(sparsity))
    for block in solved.weight.split(128, dim=1):
        assert int((block == 0).sum()) == round(sparsity * block.numel())


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), bits=st.sampled_from([2, 3, 4, 8]), symmetric=st.booleans())
@pytest.mark.slow
def test_a_searched_range_is_never_worse_than_the_extremes(seed: int, bits: int, symmetric: bool):
    generator = torch.Generator().manual_seed(seed)
    weight, importance = torch.randn(6, 64, generator=generator), torch.rand(64, generator=generator)
    grid = Grid(bits, 32, symmetric)

    def error(ranges: tuple[Tensor, Tensor]) -> float:
        scale, zero_point = (bounds[..., None] for bounds in ranges)
        grouped = weight.view(6, 2, 32)
        codes = (grouped / scale).round().add(zero_point).clamp(-grid.top, grid.top - 1)
        return float(((grouped - (codes - zero_point) * scale).square() * importance.view(1, 2, 32)).sum())

    extremes = error(find_ranges(weight, grid, torch.float16))
    assert error(find_ranges(weight, grid, torch.float16, importance=importance)) <= extremes * (1 + 1e-5)


def test_a_block_told_nothing_stays_as_it_is():
    weight = torch.randn(5, 16)
    before, loss = weight.clone(), torch.zeros(5)
    reference(
        weight, torch.eye(16), torch.ones(16), loss, None, BlockMask(given_mask=torch.zeros(5, 16, dtype=torch.bool))
    )
    assert torch.equal(weight, before)
    assert not loss.any()
    fine = BlockGrid(
        torch.full((5, 1), 2.0**-20), torch.zeros(5, 1), torch.zeros(16, dtype=torch.int32), -(2**30), 2**30
    )
    reference(weight, torch.eye(16), torch.ones(16), loss, fine, None)
    torch.testing.assert_close(weight, before, rtol=0, atol=2.0**-20)
