"""The mathematics of learned rounding, beside torch's own gradients through a rounding that passes them on."""

import pytest
import torch
from torch import Tensor

from nightpress.core.compress.grids.rounding import nearest_floats
from nightpress.core.compress.grids.stored import Coded, dequantized, from_tensors, round_weight, to_tensors
from nightpress.core.compress.passes.learned_rounding import split
from nightpress.core.compress.solvers.learned_rounding import LearnedWeight
from nightpress.core.recipes.schemes import Scheme

_ROWS, _COLUMNS, _GROUP = 12, 64, 16
SCHEMES = {
    "int2": Scheme(2, strategy="group", group_size=_GROUP),
    "int3 with zero points": Scheme(3, strategy="group", group_size=_GROUP, symmetric=False),
    "int8, a scale a row": Scheme(8),
    "mxfp4": Scheme(4, "float", "group", 32),
    "nvfp4": Scheme(4, "float", "group", _GROUP),
}


def _weight(seed: int = 0) -> Tensor:
    return torch.randn(_ROWS, _COLUMNS, generator=torch.Generator().manual_seed(seed))


def _start(scheme: Scheme, ranges: str = "least-error") -> Coded:
    weight = _weight()
    return round_weight(weight, scheme, torch.bfloat16, ranges=ranges, largest=float(weight.abs().max()))


def _gradients(scheme: Scheme, weigh: Tensor) -> dict[str, Tensor]:
    """The gradients of Σ weigh · ŵ in the offsets and the ranges' factors, by torch. Roundings pass gradients on."""

    def passing(exact: Tensor, rounded: Tensor) -> Tensor:
        return exact + (rounded - exact).detach()

    start = _start(scheme)
    scale = start.scale.float() / (1.0 if start.global_scale is None else start.global_scale)
    grouped = _weight().view(*scale.shape, -1)
    offset = torch.zeros_like(grouped, requires_grad=True)
    low, high = (torch.ones_like(scale, requires_grad=True) for _ in range(2))
    top = 2 ** (scheme.bits - 1)
    if scheme.kind == "float":
        now = (scale * low)[..., None]
        steps = grouped / now
        size = steps.detach().abs()
        local = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
        moved = (steps + offset * local).clamp(-6, 6)
        rounded = passing(moved, nearest_floats(moved.detach(), 4)) * now
    elif start.zero_point is None:
        now = (scale * low)[..., None]
        rounded = passing(grouped / now + offset, (grouped / now + offset).round()).clamp(-top, top - 1) * now
    else:
        zero_point = start.zero_point.float()
        least, most = scale * (-top - zero_point) * low, scale * (top - 1 - zero_point) * high
        now = (most - least) / (2 * top - 1)
        exact = -top - least / now
        zero = passing(exact, exact.round())[..., None]
        wide = now[..., None]
        codes = passing(grouped / wide + offset, (grouped / wide + offset).round()) + zero
        rounded = (codes.clamp(-top, top - 1) - zero) * wide
    (rounded.reshape(_ROWS, _COLUMNS) * weigh).sum().backward()  # type: ignore[no-untyped-call]
    assert offset.grad is not None
    assert low.grad is not None
    found = {"offset": offset.grad, "low": low.grad}
    return found | ({"high": high.grad} if high.grad is not None else {})


@pytest.mark.parametrize("name", SCHEMES)
def test_it_moves_against_the_gradients_through_the_rounding(name: str):
    scheme = SCHEMES[name]
    learned = LearnedWeight(_weight(), _start(scheme), scheme)
    weigh = _weight(seed=1)
    expected = _gradients(scheme, weigh)
    before = learned.offset.clone(), learned.factors.clone()
    learned.step(weigh, 0.01)
    torch.testing.assert_close(learned.offset - before[0], -0.01 * expected["offset"].sign())
    moved = learned.factors - before[1]
    if scheme.is_fp4:
        assert not moved.any()  # its scales change by leaps
        return
    # A sum of hundreds of products that is nearly zero has no sign to speak of.
    for number, end in enumerate(("low", "high")[: len(moved)]):
        clear = expected[end].abs() > 1e-4
        assert clear.float().mean() > 0.8
        torch.testing.assert_close(moved[number][clear], -0.01 * expected[end].sign()[clear])


@pytest.mark.parametrize("name", SCHEMES)
def test_it_starts_as_the_given_codes_and_stays_what_a_loader_reads(name: str):
    scheme = SCHEMES[name]
    start = _start(scheme)
    learned = LearnedWeight(_weight(), start, scheme)
    assert torch.equal(learned.weight(), dequantized(start, scheme))
    for seed in range(20):
        learned.step(_weight(seed).to(torch.bfloat16), 0.05)
        learned.weight()
    coded = learned.coded()
    assert not torch.equal(coded.codes, start.codes)
    assert torch.equal(coded.scale.float(), start.scale.float()) == scheme.is_fp4
    assert (coded.codes.dtype, coded.scale.dtype) == (start.codes.dtype, start.scale.dtype)
    assert torch.equal(learned.weight(), dequantized(coded, scheme))
    assert torch.equal(from_tensors("w.weight", scheme, to_tensors("w.weight", scheme, coded)), learned.weight())


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_that_are_not_the_nearest_are_kept_until_a_gradient_moves_them(symmetric: bool):
    scheme = Scheme(3, strategy="group", group_size=_GROUP, symmetric=symmetric)
    nearest = _start(scheme)
    elsewhere = torch.randint(-1, 2, nearest.codes.shape, generator=torch.Generator().manual_seed(2), dtype=torch.int8)
    start = Coded((nearest.codes + elsewhere).clamp(-4, 3), nearest.scale, nearest.zero_point)
    learned = LearnedWeight(_weight(), start, scheme)
    assert torch.equal(learned.coded().codes, start.codes)
    # Back towards the weight: most codes cross to their neighbour at the first steps.
    for _ in range(3):
        learned.step(learned.weight() - _weight(), 0.1)
    changed = (learned.coded().codes != start.codes) & (start.codes != nearest.codes)
    assert changed.sum() > 0.5 * (start.codes != nearest.codes).sum()


def test_it_finds_codes_whose_outputs_are_nearer_than_those_of_the_nearest_codes():
    scheme = SCHEMES["int3 with zero points"]
    weight, start = _weight(), _start(scheme)
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(256, _COLUMNS, generator=generator) + 2 * torch.randn(256, 1, generator=generator)
    gram = inputs.T @ inputs

    def loss(rounded: Tensor) -> float:
        lost = rounded - weight
        return float(((lost @ gram) * lost).sum())

    learned = LearnedWeight(weight, start, scheme)
    seen = []
    for step in range(100):
        learned.step((learned.weight() - weight) @ gram, (1 - step / 100) / 100)
        seen.append(loss(learned.weight()))
    assert min(seen) < 0.5 * loss(dequantized(start, scheme))


def test_a_group_of_zeros_stays_finite():
    weight = _weight()
    weight[:, :_GROUP] = 0
    for name in ("int2", "nvfp4"):
        scheme = SCHEMES[name]
        start = round_weight(weight, scheme, torch.bfloat16, largest=float(weight.abs().max()))
        learned = LearnedWeight(weight, start, scheme)
        for seed in range(10):
            learned.step(_weight(seed), 0.1)
            learned.weight()
        assert torch.isfinite(learned.weight()).all()


def test_some_batches_judge_and_do_not_teach():
    taught, judged = split(16)
    assert (len(taught), judged) == (14, [7, 15])
    assert sorted(taught + judged) == list(range(16))
    assert split(3) == ([0, 1, 2], [0, 1, 2])
