"""Weights in GGUF's blocks, read back by gguf's own reader."""

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, quants

from nightpress.core.compress.export.gguf.blocks import codes_type, encode, encode_codes, fitting_type, type_named
from nightpress.core.compress.grids.gguf_blocks import BlockCoded, BlockRanges
from nightpress.core.compress.grids.gguf_ranges import round_to_blocks
from nightpress.core.compress.grids.pressed_weights import Codes
from nightpress.core.compress.solvers.gguf_codes import solve_blocks
from nightpress.core.compress.solvers.obs import factorize
from nightpress.core.recipes.gguf_types import GGUF_TYPES, GgufType

EVEN = [kind for kind in GGUF_TYPES.values() if kind.even]

#: type → relative error of normally distributed weights, smaller with each type
ERRORS = {
    "q2_k": 0.28,
    "q3_k": 0.16,
    "q4_0": 0.09,
    "q4_k": 0.075,
    "q5_0": 0.045,
    "q5_k": 0.038,
    "q6_k": 0.019,
    "q8_0": 0.006,
}


def _weights(rows: int = 16, columns: int = 512) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.02, (rows, columns)).astype(np.float32)


@pytest.mark.parametrize("name", ERRORS)
def test_a_type_loses_no_more_than_its_bits(name: str):
    kind, weight = type_named(name), _weights()
    data = encode(weight, kind)
    assert data.shape == (16, 512 // GGML_QUANT_SIZES[kind][0] * GGML_QUANT_SIZES[kind][1])
    error = np.linalg.norm(quants.dequantize(data, kind) - weight) / np.linalg.norm(weight)
    assert error < ERRORS[name]


@pytest.mark.parametrize(("ours", "simpler"), [("q4_k", "q4_1"), ("q5_k", "q5_1")])
def test_ranges_chosen_by_error_beat_extremes_with_more_bits(ours: str, simpler: str):
    weight = _weights()
    errors = [
        np.linalg.norm(quants.dequantize(encode(weight, type_named(name)), type_named(name)) - weight)
        for name in (ours, simpler)
    ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("kind", EVEN, ids=lambda kind: kind.name)
def test_the_bytes_of_blocks_are_read_as_the_floats_that_the_pass_computed_with(kind: GgufType):
    """All codes, scales and minima that a type can hold, in any order."""
    random = torch.Generator().manual_seed(kind.bits)
    rows, blocks, parts = 6, 3, kind.block // kind.part

    def halves(low: float) -> torch.Tensor:
        return (torch.rand(rows, blocks, generator=random) * 0.02 + low).half()

    def multiples() -> torch.Tensor:
        if kind.scale_bits is None:
            return torch.ones(rows, blocks, parts, dtype=torch.int32)
        low = 0 if kind.minimum else -(2 ** (kind.scale_bits - 1))
        shape = (rows, blocks, parts)
        return torch.randint(low, low + 2**kind.scale_bits, shape, generator=random, dtype=torch.int32)

    ranges = BlockRanges(halves(-0.01), multiples(), *([halves(-0.01), multiples()] if kind.minimum else []))
    codes = torch.randint(0, 2**kind.bits, (rows, blocks * kind.block), generator=random).to(torch.uint8)
    coded = BlockCoded(kind, codes, ranges)
    stored = coded.to_bytes().numpy()
    assert stored.shape == (rows, kind.row_bytes(blocks * kind.block))
    np.testing.assert_array_equal(quants.dequantize(stored, type_named(kind.name)), coded.dequantize().numpy())


@pytest.mark.parametrize("name", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q4_0", "q5_1"])
def test_columns_that_matter_are_rounded_better(name: str):
    kind, weight = GGUF_TYPES[name], torch.from_numpy(_weights())
    importance = torch.from_numpy(np.random.default_rng(1).lognormal(0, 2, 512).astype(np.float32))

    def lost(coded: BlockCoded) -> float:
        return float(((coded.dequantize() - weight).square() * importance).sum())

    assert lost(round_to_blocks(weight, kind, importance)) < 0.95 * lost(round_to_blocks(weight, kind))


@pytest.mark.parametrize("kind", EVEN, ids=lambda kind: kind.name)
def test_codes_that_make_up_for_errors_lose_less_than_the_nearest(kind: GgufType):
    random = torch.Generator().manual_seed(0)
    weight = torch.from_numpy(_weights(64, 512))
    weight[3], weight[4] = 0, weight[4].abs()  # a row of zeros, and one without negative weights
    mixed = torch.randn(512, 512, generator=random) * 0.05 + torch.diag(torch.rand(512, generator=random) * 3)
    inputs = torch.randn(2048, 512, generator=random) @ mixed
    gram = inputs.T @ inputs

    def lost(coded: BlockCoded) -> torch.Tensor:
        return ((weight - coded.dequantize()) @ inputs.T).square().sum(1)

    solved = lost(solve_blocks(weight, gram, factorize(gram, by_power=True), kind))
    nearest = lost(round_to_blocks(weight, kind, gram.diagonal()))
    assert solved.sum() < 0.8 * nearest.sum()
    assert (solved <= 1.01 * nearest).all()


@pytest.mark.parametrize("name", ["q4_k", "q5_k", "q6_k"])
def test_odd_blocks_come_back(name: str):
    """Rows of zeros, of equal weights, with one huge weight, and without negative weights."""
    kind = type_named(name)
    weight = np.zeros((4, 256), np.float32)
    weight[1] = 0.01
    weight[2, 7] = 30.0
    weight[3] = np.linspace(0.5, 1.0, 256)
    back = quants.dequantize(encode(weight, kind), kind)
    assert np.isfinite(back).all()
    np.testing.assert_array_equal(back[0], 0)
    np.testing.assert_allclose(back[1], 0.01, rtol=0.01)
    np.testing.assert_allclose(back[2, 7], 30.0, rtol=0.01)
    np.testing.assert_allclose(back[3], weight[3], atol=0.04)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 128])
def test_codes_keep_their_values(bits: int, symmetric: bool, group: int):
    random = np.random.default_rng(bits)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    groups = (8, 256 // group)
    weight = Codes(
        bits=bits,
        codes=random.integers(low, high, (8, 256)).astype(np.int8),
        scale=random.uniform(0.001, 0.1, groups).astype(np.float16).astype(np.float32),
        zero_point=None if symmetric else random.integers(low, high, groups).astype(np.int8),
    )
    kind = codes_type(bits, group, symmetric=symmetric)
    if bits == 8 and not symmetric:
        assert kind is None
        return
    assert kind is not None
    back = quants.dequantize(encode_codes(weight), kind)
    # Q4_1 stores its minimum as a float16, which rounds it. Everything else is exact.
    np.testing.assert_allclose(back, weight.dequantize(), atol=0.0 if symmetric else 1e-3)


def test_a_row_that_a_block_does_not_divide_takes_a_smaller_one():
    assert fitting_type(type_named("q4_k"), 576).name == "Q5_0"
    assert fitting_type(type_named("q6_k"), 576).name == "Q8_0"
    assert fitting_type(type_named("q2_k"), 576).name == "Q4_0"
    assert fitting_type(type_named("q4_0"), 576).name == "Q4_0"
    assert fitting_type(type_named("q8_0"), 100).name == "F16"
    assert codes_type(4, 48, symmetric=True) is None


def test_types_have_the_sizes_that_ggml_knows():
    sizes = {name: (kind.block, kind.block_bytes) for name, kind in GGUF_TYPES.items()}
    assert sizes == {name: GGML_QUANT_SIZES[type_named(name)] for name in GGUF_TYPES}
