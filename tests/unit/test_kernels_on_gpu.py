"""Triton kernels compared with their torch references. Skipped on a machine without an NVIDIA GPU."""

import pytest
import torch

from nightpress.core.compress.grids.grid import Grid
from nightpress.core.compress.grids.ranges import find_ranges, search
from nightpress.core.compress.kernels.column_rules import BlockGrid, BlockMask
from nightpress.core.compress.kernels.obs_block import obs_block, reference
from nightpress.core.compress.solvers.learned_rounding import descend, rounded
from nightpress.core.compress.solvers.obs import Prune, Quantize, factorize, solve

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("shape", [(1000, 128), (37, 64), (64, 100)])
@pytest.mark.parametrize("kind", ["grid", "given_mask", "pattern", "pattern and grid", "fp4 grid"])
def test_a_block_comes_out_as_in_float64(shape: tuple[int, int], kind: str):
    rows, columns = shape
    torch.manual_seed(rows)
    weight = torch.randn(rows, columns + 8, device="cuda")[:, :columns]
    mix = torch.randn(columns, 2 * columns, device="cuda")
    upper = torch.linalg.cholesky((mix @ mix.T / columns + torch.eye(columns, device="cuda")).flip(0, 1)).flip(0, 1)
    cost = upper.diagonal().contiguous()
    spread = (torch.linalg.inv(upper) * cost[:, None]).contiguous()
    scale = torch.rand(rows, 2, device="cuda") * 0.3 + 0.1
    zero_point = torch.randint(-8, 8, (rows, 2), device="cuda").float()
    group = (torch.arange(columns, device="cuda") * 2 // columns).int()
    fp4 = "fp4" in kind
    grid = BlockGrid(scale, zero_point, group, -8, 7, fp4) if "grid" in kind else None
    exact_grid = grid and BlockGrid(scale.double(), zero_point.double(), group, -8, 7, fp4)
    mask = BlockMask(pattern=(2, 4)) if "pattern" in kind else None
    if kind == "given_mask":
        mask = BlockMask(given_mask=torch.rand(rows, columns, device="cuda") < 0.5)
    ours, exact = weight.clone(), weight.double()
    loss, exact_loss = torch.zeros(rows, device="cuda"), torch.zeros(rows, device="cuda", dtype=torch.float64)
    obs_block(ours, spread, cost, loss, grid, mask)
    reference(exact, spread.double(), cost.double(), exact_loss, exact_grid, mask)
    same = (ours - exact).abs().amax(1) < 1e-3  # where a tie rounds differently, the rest of the row differs
    assert float(same.double().mean()) > 0.99
    torch.testing.assert_close(loss[same].double(), exact_loss[same], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("by_power", [False, True])
@pytest.mark.parametrize("prune", [None, Prune(0.5), Prune(0.5, (2, 4))])
def test_a_stack_of_weights_comes_out_as_each_does_alone(prune: Prune | None, by_power: bool):
    if by_power and prune is not None and prune.pattern is not None:
        pytest.skip("a pattern needs its columns in their own order")
    torch.manual_seed(0)
    weights = torch.randn(5, 52, 1400, device="cuda")
    inputs = torch.randn(5, 4000, 1400, device="cuda")
    inputs[3] = 0
    grams = inputs.mT @ inputs
    how = Quantize(Grid(4, 100, symmetric=False), torch.bfloat16, ranges="least-error")
    together = solve(weights, factorize(grams, by_power=by_power), how, prune)
    for at in range(5):
        alone = solve(weights[at], factorize(grams[at], by_power=by_power), how, prune)
        torch.testing.assert_close(together.loss[at].sum(), alone.loss.sum(), rtol=1e-2, atol=1e-6)
        assert together.codes is not None
        assert alone.codes is not None
        assert float((together.codes[at] == alone.codes).double().mean()) > 0.98


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("columns", "group_size"), [(512, 64), (384, 96), (700, None)])
def test_ranges_are_those_of_the_reference(columns: int, group_size: int | None, stored: torch.dtype, symmetric: bool):
    torch.manual_seed(columns)
    weight, importance = torch.randn(50, columns, device="cuda"), torch.rand(columns, device="cuda")
    grid = Grid(4, group_size, symmetric)
    ours, expected = find_ranges(weight, grid, stored, importance=importance), search(weight, grid, stored, importance)
    for figure, other in zip(ours, expected, strict=True):
        # Some ranges are equally good, and either may be chosen.
        assert float(torch.isclose(figure, other, rtol=1e-5, atol=0).double().mean()) > 0.98


@pytest.mark.parametrize("prune", [None, Prune(0.5), Prune(0.5, (2, 4))])
def test_a_whole_weight_comes_out_on_the_gpu_as_on_the_cpu(prune: Prune | None):
    torch.manual_seed(0)
    weight, inputs = torch.randn(96, 1400), torch.randn(4000, 1400) @ (torch.eye(1400) + torch.randn(1400, 1400) / 40)
    gram = inputs.T @ inputs
    how = Quantize(Grid(4, 100), torch.bfloat16, ranges="least-error")
    here = solve(weight, factorize(gram), how, prune)
    there = solve(weight.cuda(), factorize(gram.cuda()), how, prune)
    torch.testing.assert_close(there.loss.sum().cpu(), here.loss.sum(), rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    "grid",
    [
        Grid(2, 64),
        Grid(3, 96, symmetric=False),
        Grid(8, None),
        Grid(4, None, symmetric=False),
        Grid(4, 32, kind="float"),
    ],
    ids=lambda grid: f"{grid.kind}{grid.bits} {grid.group_size}",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_learned_rounding_is_that_of_the_cpu(grid: Grid, dtype: torch.dtype):
    torch.manual_seed(0)
    rows, columns = 24, 6912  # a row is wider than a program's tile
    groups = grid.groups(columns)
    weight = torch.randn(rows, groups, columns // groups)
    offset = torch.rand_like(weight) - 0.5
    scale = (torch.rand(rows, groups) + 0.5) / grid.top * torch.randn(rows, groups).sign()
    zero_point = None if grid.symmetric else torch.randint(-grid.top, grid.top, (rows, groups)).float()
    gradient = torch.randn_like(weight).to(dtype)
    there = [None if part is None else part.cuda() for part in (weight, offset, scale, zero_point)]
    assert torch.equal(rounded(*there, grid).cpu(), rounded(weight, offset, scale, zero_point, grid))
    sums = descend(gradient.cuda(), *there, grid, 0.05)
    expected = descend(gradient, weight, offset, scale, zero_point, grid, 0.05)
    assert torch.equal(there[1].cpu(), offset)
    for ours, theirs in zip(sums, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-3)
