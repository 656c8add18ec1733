"""Weights in GGUF's blocks, read back by gguf's own reader."""

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, quants

from nightpress.core.compress.export.gguf.blocks import codes_type, encode, encode_codes, fitting_type, type_named
from nightpress.core.compress.grids.pressed_weights import Codes

#: type → relative error of normally distributed weights, smaller with each type
ERRORS = {"q4_0": 0.09, "q4_k": 0.075, "q5_0": 0.045, "q5_k": 0.038, "q6_k": 0.019, "q8_0": 0.006}


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
    assert fitting_type(type_named("q4_0"), 576).name == "Q4_0"
    assert fitting_type(type_named("q8_0"), 100).name == "F16"
    assert codes_type(4, 48, symmetric=True) is None
