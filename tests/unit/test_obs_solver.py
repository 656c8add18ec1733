"""The Optimal Brain Surgeon solver, compared with closed forms and with simple float64 versions of the published algorithms."""

import pytest
import torch
from torch import Tensor

from nightpress.core.compress.grids.grid import Grid
from nightpress.core.compress.grids.rounding import dequantize
from nightpress.core.compress.solvers.gptq import round_obs
from nightpress.core.compress.solvers.obs import Prune, Quantize, factorize, solve
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.schemes import Scheme


def _problem(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight [rows, columns] and the Gram matrix [columns, columns] of correlated inputs with very different power, in float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5 + torch.eye(columns)
    inputs = torch.randn(4 * columns, columns, generator=generator, dtype=torch.float64) @ mix
    inputs *= torch.rand(columns, generator=generator, dtype=torch.float64) * 3 + 0.05
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return weight, inputs.T @ inputs


def _damped(gram: Tensor, damping: float = 0.01) -> Tensor:
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def _step(values: Tensor, bits: int) -> Tensor:
    """The step of a symmetric grid for weights [..., g]. Up to 4 bits it is negative where the largest of them is positive."""
    top = 2 ** (bits - 1)
    low, high = values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)
    turned = (high > -low) if bits <= 4 else torch.zeros_like(low, dtype=torch.bool)
    below, above = torch.where(turned, high, -low), torch.where(turned, -low, high)
    size = torch.maximum(below / top, above / (top - 0.5))
    return torch.where(turned, -size, size)


def _plain_gptq(weight: Tensor, gram: Tensor, group_size: int, bits: int, order: Tensor) -> Tensor:
    """Equations 2 and 3 of GPTQ: quantize column j, change the others by −(w − q)/[H⁻¹]_jj · H⁻¹_j, eliminate j from H⁻¹."""
    w, inverse = weight.clone(), torch.linalg.inv(_damped(gram))
    natural = bool((order == torch.arange(len(order))).all())
    top = 2 ** (bits - 1)

    scales = {first: _step(weight[:, first : first + group_size], bits) for first in range(0, len(order), group_size)}
    for j in order.tolist():
        first = j // group_size * group_size
        if natural and j == first:
            scales[first] = _step(w[:, first : first + group_size], bits)
        q = (w[:, j] / scales[first]).round().clamp(-top, top - 1) * scales[first]
        w -= ((w[:, j] - q) / inverse[j, j])[:, None] * inverse[j]
        w[:, j] = q
        inverse = inverse - inverse[:, [j]] @ inverse[[j]] / inverse[j, j]
        inverse[j, j] = 1.0  # column j is done: the rest of its row and column is zero
    return w


def _plain_sparsegpt(weight: Tensor, gram: Tensor, sparsity: float, pattern: tuple[int, int] | None) -> Tensor:
    """Algorithm 1 of SparseGPT with B = Bs = 128, unstructured or with an N:M mask."""
    w = weight.clone()
    chol = torch.linalg.cholesky(torch.linalg.inv(_damped(gram)), upper=True)
    rows, columns = w.shape
    gone = torch.zeros_like(w, dtype=torch.bool)
    for start in range(0, columns, 128):
        end = min(start + 128, columns)
        errors = torch.zeros(rows, end - start, dtype=w.dtype)
        if pattern is None:
            score = w[:, start:end] ** 2 / chol.diagonal()[start:end] ** 2
            kth = score.flatten().sort().values[round(sparsity * score.numel()) - 1]
            gone[:, start:end] = score <= kth
        for j in range(start, end):
            if pattern is not None and j % pattern[1] == 0:
                near = slice(j, j + pattern[1])
                score = w[:, near] ** 2 / chol.diagonal()[near] ** 2
                gone[:, near].scatter_(1, score.argsort(1)[:, : pattern[1] - pattern[0]], True)
            q = torch.where(gone[:, j], 0.0, w[:, j])
            errors[:, j - start] = (w[:, j] - q) / chol[j, j]
            w[:, j:end] -= errors[:, [j - start]] * chol[[j], j:end]
            w[:, j] = q
        w[:, end:] -= errors @ chol[start:end, end:]
    return w


def test_two_columns_by_hand():
    # H = [[2, 1], [1, 2]], steps of −1: w₀ = 0.4 → 0, and w₁ moves by (w₀ − q₀)·H₀₁/H₁₁ = 0.2, from 0.4 to 0.6 → 1.
    weight, gram = torch.tensor([[0.4, 0.4, 8.0]]).double(), torch.diag(torch.tensor([2.0, 2.0, 1.0])).double()
    gram[0, 1] = gram[1, 0] = 1.0
    solved = solve(weight, factorize(gram, damping=1e-12), Quantize(Grid(4), torch.float64))
    assert solved.weight.tolist() == [[0.0, 1.0, 8.0]]


def test_uncorrelated_inputs_are_rounded_to_nearest():
    weight, _ = _problem(8, 64)
    solved = solve(weight, factorize(torch.eye(64).double()), Quantize(Grid(4, 32), torch.float64))
    assert solved.codes is not None
    grouped = weight.view(8, 2, 32)
    step = _step(grouped, 4)[..., None]
    assert torch.equal(solved.codes.view(8, 2, 32), (weight.view(8, 2, 32) / step).round().clamp(-8, 7).to(torch.int8))


@pytest.mark.parametrize("by_power", [False, True])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 16), (3, 64), (4, 128), (8, 32)])
def test_gptq_is_the_published_algorithm(bits: int, group_size: int, by_power: bool):
    weight, gram = _problem(24, 256, seed=bits)
    factor = factorize(gram, by_power=by_power)
    order = torch.arange(256) if factor.order is None else factor.order
    solved = solve(weight, factor, Quantize(Grid(bits, group_size), torch.float64))
    torch.testing.assert_close(solved.weight, _plain_gptq(weight, gram, group_size, bits, order), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pattern", [None, (2, 4), (1, 4), (4, 8)])
def test_sparsegpt_is_the_published_algorithm(pattern: tuple[int, int] | None):
    weight, gram = _problem(24, 320)
    solved = solve(weight, factorize(gram), prune=Prune(0.5, pattern))
    torch.testing.assert_close(solved.weight, _plain_sparsegpt(weight, gram, 0.5, pattern), rtol=1e-9, atol=1e-9)


def test_the_reported_loss_is_the_quadratic_form():
    weight, gram = _problem(16, 192)
    solved = solve(weight, factorize(gram, by_power=True), Quantize(Grid(4, 64, symmetric=False), torch.float32))
    lost = weight - solved.weight
    torch.testing.assert_close(solved.loss, ((lost @ _damped(gram)) * lost).sum(1))


def test_stacked_weights_come_out_as_they_do_alone():
    weight, gram = _problem(40, 200)
    factor, how = factorize(gram), (Quantize(Grid(4, 40), torch.float64), Prune(0.5, (2, 4)))
    together = solve(weight, factor, *how)
    alone = [solve(part, factor, *how).weight for part in weight.split(20)]
    torch.testing.assert_close(together.weight, torch.cat(alone), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("by_power", [False, True])
@pytest.mark.parametrize("prune", [None, Prune(0.5), Prune(0.5, (2, 4))])
@pytest.mark.parametrize("ranges", ["extremes", "least-error", "half-quadratic"])
def test_weights_with_inputs_of_their_own_come_out_side_by_side_as_alone(
    ranges: str, prune: Prune | None, by_power: bool
):
    if by_power and prune is not None and prune.pattern is not None:
        pytest.skip("a pattern needs its columns in their own order")
    problems = [_problem(12, 200, seed) for seed in (1, 2, 3)]
    problems[1] = (problems[1][0], torch.zeros_like(problems[1][1]))  # an expert that no token reached
    how = Quantize(Grid(4, 40, symmetric=False), torch.float64, ranges)
    weights, grams = (torch.stack(parts) for parts in zip(*problems, strict=True))
    together = solve(weights, factorize(grams, by_power=by_power), how, prune)
    assert together.codes is not None
    assert together.scale is not None
    assert together.zero_point is not None
    for at, (weight, gram) in enumerate(problems):
        alone = solve(weight, factorize(gram, by_power=by_power), how, prune)
        assert alone.codes is not None
        assert alone.scale is not None
        assert alone.zero_point is not None
        torch.testing.assert_close(together.weight[at], alone.weight, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(together.loss[at], alone.loss, rtol=1e-9, atol=1e-9)
        assert torch.equal(together.codes[at], alone.codes)
        torch.testing.assert_close(together.scale[at], alone.scale)
        assert torch.equal(together.zero_point[at], alone.zero_point)


@pytest.mark.parametrize("refine", [False, True])
def test_a_stack_is_rounded_as_its_weights_are(refine: bool):
    problems = [_problem(12, 256, seed) for seed in (1, 2)]
    weights, grams = (torch.stack(parts) for parts in zip(*problems, strict=True))
    scheme = Scheme(4, 64)
    together = round_obs(weights, grams, factorize(grams), scheme, torch.float64, ranges="least-error", refine=refine)
    for at, (weight, gram) in enumerate(problems):
        alone = round_obs(weight, gram, factorize(gram), scheme, torch.float64, ranges="least-error", refine=refine)
        assert torch.equal(together.codes[at], alone.codes)
        torch.testing.assert_close(together.scale[at], alone.scale)


@pytest.mark.slow
def test_float32_gives_the_codes_of_float64_nearly_everywhere():
    weight, gram = _problem(32, 1280)
    how = Quantize(Grid(4, 128), torch.bfloat16)
    exact = solve(weight, factorize(gram), how)
    single = solve(weight.float(), factorize(gram.float()), how)
    assert exact.codes is not None
    assert single.codes is not None
    assert float((exact.codes == single.codes).double().mean()) > 0.98
    torch.testing.assert_close(single.loss.sum().double(), exact.loss.sum(), rtol=5e-3, atol=0)


def test_columns_that_never_saw_an_input_are_rounded_and_change_nothing_else():
    weight, gram = _problem(8, 64)
    gram[:, 5] = gram[5, :] = 0
    solved = solve(weight, factorize(gram), Quantize(Grid(8, 64), torch.float64))
    assert solved.scale is not None
    assert bool(((solved.weight[:, 5] - weight[:, 5]).abs() <= solved.scale[:, 0] / 2 + 1e-12).all())
    silent = solve(weight, factorize(torch.zeros_like(gram)), Quantize(Grid(8, 64), torch.float64))
    assert bool((silent.weight - weight).abs().amax() <= silent.scale.amax() / 2 + 1e-12)  # type: ignore[union-attr]


def test_what_is_not_finite_is_refused():
    gram = torch.full((4, 4), torch.nan)
    with pytest.raises(NightpressError) as caught:
        factorize(gram)
    assert caught.value.code is ErrorCode.NUMERICAL_FAILURE
    weight = torch.full((2, 4), torch.inf)
    with pytest.raises(NightpressError):
        solve(weight, factorize(torch.eye(4)), prune=Prune(0.5, (2, 4)))


def test_codes_scales_and_zero_points_say_the_same_as_the_weight():
    weight, gram = _problem(16, 256)
    for symmetric in (True, False):
        for by_power in (True, False):
            how = Quantize(Grid(4, 64, symmetric), torch.bfloat16, ranges="least-error")
            solved = solve(weight.float(), factorize(gram.float(), by_power=by_power), how, Prune(0.3))
            assert solved.codes is not None
            assert solved.scale is not None
            assert solved.scale.dtype == torch.bfloat16
            torch.testing.assert_close(dequantize(solved.codes, solved.scale, solved.zero_point), solved.weight)
