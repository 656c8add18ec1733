"""fp4 grids: GPTQ's and learned codes beside the nearest ones, what compressed-tensors reads, and inputs rounded as it rounds them."""

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from torch import Tensor, nn

from nightpress.core.compress.grids.rounded_inputs import input_global_scale, round_inputs
from nightpress.core.compress.grids.stored import Coded, dequantized, round_weight, to_tensors
from nightpress.core.compress.solvers.gptq import round_obs
from nightpress.core.compress.solvers.learned_rounding import LearnedWeight
from nightpress.core.compress.solvers.obs import factorize, output_loss
from nightpress.core.recipes.schemes import Activations, Scheme

FORMATS = {"nvfp4": Scheme(4, "float", "group", 16), "mxfp4": Scheme(4, "float", "group", 32)}
INPUTS = {
    "nvfp4": Scheme(4, "float", "group", 16, activations=Activations(bits=4)),
    "mxfp4": Scheme(4, "float", "group", 32, activations=Activations(bits=4)),
    "mxfp4 and fp8": Scheme(4, "float", "group", 32, activations=Activations(bits=8)),
}


def _problem(rows: int = 48, columns: int = 256) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = 0.05 * torch.randn(rows, columns, generator=generator)
    mix = torch.eye(columns) + torch.randn(columns, columns, generator=generator) / 16
    inputs = torch.randn(1024, columns, generator=generator) @ mix + 2 * torch.randn(1024, 1, generator=generator)
    return weight, inputs.T @ inputs


def _nearest(weight: Tensor, scheme: Scheme, ranges: str, power: Tensor | None = None) -> Coded:
    largest = 2 * float(weight.abs().max())  # another weight of the model is larger
    return round_weight(weight, scheme, torch.bfloat16, ranges=ranges, importance=power, largest=largest)


@pytest.mark.parametrize("by_power", [True, False], ids=["activation", "natural"])
@pytest.mark.parametrize("name", FORMATS)
def test_gptq_loses_less_at_the_outputs_than_the_nearest_codes(name: str, by_power: bool):
    scheme, (weight, gram) = FORMATS[name], _problem()
    factor = factorize(gram, by_power=by_power)

    def loss(coded: Coded) -> Tensor:
        return output_loss(weight, dequantized(coded, scheme), factor)

    nearest = _nearest(weight, scheme, "least-error", factor.power)
    largest = 2 * float(weight.abs().max())
    coded = round_obs(weight, gram, factor, scheme, torch.bfloat16, ranges="least-error", refine=True, largest=largest)
    assert (loss(coded) <= loss(nearest)).all()
    assert loss(coded).sum() < 0.8 * loss(nearest).sum()
    assert loss(nearest).sum() < 0.95 * loss(_nearest(weight, scheme, "extremes")).sum()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.slow
def test_weights_in_a_stack_come_out_as_they_do_alone(name: str):
    scheme, (weight, gram) = FORMATS[name], _problem()
    stacked, grams = torch.stack([weight, weight.flip(0)]), torch.stack([gram, 2 * gram])
    how = {"ranges": "least-error", "refine": True, "largest": float(weight.abs().max())}
    together = round_obs(stacked, grams, factorize(grams), scheme, torch.bfloat16, **how)  # type: ignore[arg-type]
    for at in range(2):
        alone = round_obs(stacked[at], grams[at], factorize(grams[at]), scheme, torch.bfloat16, **how)  # type: ignore[arg-type]
        assert torch.equal(together.codes[at], alone.codes)
        assert torch.equal(together.scale[at].float(), alone.scale.float())


@pytest.mark.parametrize("name", FORMATS)
def test_learned_codes_lose_less_than_the_nearest_and_begin_as_gptqs_are(name: str):
    scheme, (weight, gram) = FORMATS[name], _problem(24, 64)
    factor = factorize(gram)

    def loss(rounded: Tensor) -> float:
        return float(output_loss(weight, rounded, factor).sum())

    nearest = _nearest(weight, scheme, "least-error", factor.power)
    largest = 2 * float(weight.abs().max())
    solved = round_obs(weight, gram, factor, scheme, torch.bfloat16, ranges="least-error", largest=largest)
    assert not torch.equal(solved.codes, nearest.codes)
    assert torch.equal(LearnedWeight(weight, solved, scheme).coded().codes, solved.codes)
    learned = LearnedWeight(weight, nearest, scheme)
    seen = []
    for step in range(60):
        learned.step((learned.weight() - weight) @ gram, (1 - step / 60) / 60)
        seen.append(loss(learned.weight()))
    assert min(seen) < 0.8 * loss(dequantized(nearest, scheme))


@pytest.mark.parametrize("name", FORMATS)
def test_the_library_reads_the_weight_that_gptq_meant(name: str):
    scheme, (weight, gram) = FORMATS[name], _problem()
    factor = factorize(gram)
    coded = round_obs(
        weight, gram, factor, scheme, torch.bfloat16, ranges="least-error", largest=float(weight.abs().max())
    )
    state = {part.removeprefix("l."): tensor for part, tensor in to_tensors("l.weight", scheme, coded).items()}
    arguments = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**scheme.weight_arguments()))
    read = BaseCompressor.get_value_from_registry(scheme.format).decompress(state, arguments)["weight"]
    # The library computes in bfloat16.
    torch.testing.assert_close(read.float(), dequantized(coded, scheme), rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", INPUTS)
def test_inputs_are_rounded_as_the_library_rounds_them(name: str, dtype: torch.dtype):
    scheme = INPUTS[name]
    generator = torch.Generator().manual_seed(1)
    x = (torch.randn(2, 7, 256, generator=generator) * torch.rand(256, generator=generator).pow(3) * 20).to(dtype)
    x[0, 0, :128] = 0
    total = input_global_scale(x.abs().max()) if scheme.has_input_global_scale else None
    given = scheme.activation_arguments()
    assert given is not None
    arguments = QuantizationArgs(**given)
    scale, zero = compute_dynamic_scales_and_zp(x, arguments, nn.Linear(1, 1), total)
    theirs = fake_quantize(x, scale, zero, arguments, total)
    ours = round_inputs(x, scheme, total)
    assert ours.dtype == dtype
    same = torch.isclose(ours.float(), theirs.float(), rtol=1e-2, atol=1e-6)
    assert float(same.float().mean()) > (0.999 if dtype == torch.float32 else 0.97)  # ties, and scales in bfloat16
    assert torch.equal(ours[0, 0, :128], x[0, 0, :128])
    assert not torch.equal(ours, x)


def test_gradients_pass_through_rounded_inputs():
    x = torch.randn(3, 32, requires_grad=True)
    weigh = torch.randn(3, 32)
    (round_inputs(x, INPUTS["mxfp4"]) * weigh).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert torch.equal(x.grad, weigh)
