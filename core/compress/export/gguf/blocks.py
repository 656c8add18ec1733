"""Weights as the blocks of bytes that GGUF stores: the codes a pass chose written down as they are, floats rounded to the nearest.

A row is cut into blocks of 32 or 256 weights that follow each other; the layouts are those of ggml's `ggml-common.h`.
"""

from collections.abc import Callable

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from numpy.typing import NDArray

from nightpress.core.compress.export.gguf.kquants import encode_q4_k, encode_q5_k, encode_q6_k
from nightpress.core.compress.grids.pressed_weights import Codes

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Type = GGMLQuantizationType
Encoder = Callable[[Floats], Bytes]

_BLOCK = 32
_ENCODERS: dict[GGMLQuantizationType, Encoder] = {
    Type.Q4_K: encode_q4_k,
    Type.Q5_K: encode_q5_k,
    Type.Q6_K: encode_q6_k,
}
#: What a type gives way to in a row that its blocks don't divide: as llama.cpp does, the next one that loses nothing by it.
_NARROWER = {Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0}


def type_named(name: str) -> GGMLQuantizationType:
    """`q4_k` → GGMLQuantizationType.Q4_K"""
    return GGMLQuantizationType[name.upper()]


def fitting_type(wanted: GGMLQuantizationType, columns: int) -> GGMLQuantizationType:
    """`wanted`, or what takes its place in rows of that many columns."""
    while columns % GGML_QUANT_SIZES[wanted][0]:
        wanted = _NARROWER.get(wanted, Type.F16)
    return wanted


def encode(weight: Floats, kind: GGMLQuantizationType) -> Bytes:
    """weight [out, in] → its bytes [out, bytes a row], each block's range where rounding costs least, or as ggml's reference has it."""
    if kind in _ENCODERS:
        rows, columns = weight.shape
        return _ENCODERS[kind](weight.reshape(-1, 256)).reshape(rows, columns // 256 * GGML_QUANT_SIZES[kind][1])
    encoded: Bytes = np.ascontiguousarray(quants.quantize(weight, kind)).view(np.uint8)
    return encoded


def codes_type(bits: int, group_size: int, *, symmetric: bool) -> GGMLQuantizationType | None:
    """The layout that holds a pass's codes as they are: up to 4 bits Q4_0, or Q4_1 with zero points; 8 symmetric bits Q8_0.

    None where there is none: groups that 32 doesn't divide, asymmetric 8 bits.
    """
    if group_size % _BLOCK:
        return None
    if bits <= 4:
        return Type.Q4_0 if symmetric else Type.Q4_1
    return Type.Q8_0 if bits == 8 and symmetric else None


def encode_codes(weight: Codes) -> Bytes:
    """Codes that `codes_type` has a layout for → [out, bytes a row]: the same numbers, their scales as float16.

    A group of 64 or more spends a scale on each 32 of its weights here.
    """
    blocks = weight.in_blocks(_BLOCK)
    rows, count = blocks.scale.shape
    codes = blocks.codes.reshape(rows, count, _BLOCK)
    scale = _half(blocks.scale)
    if weight.bits == 8:
        return np.concatenate([scale, codes.view(np.uint8)], axis=2).reshape(rows, -1)
    if blocks.zero_point is None:
        return np.concatenate([scale, _nibbles(codes, 8)], axis=2).reshape(rows, -1)
    # Q4_1 stands for scale · code + minimum, with codes from 0 up.
    top = 2 ** (weight.bits - 1)
    least = _half(-blocks.scale * (blocks.zero_point.astype(np.float32) + top))
    return np.concatenate([scale, least, _nibbles(codes, top)], axis=2).reshape(rows, -1)


def _half(values: Floats) -> Bytes:
    """[out, blocks] → the bytes of float16 [out, blocks, 2]"""
    return values.astype(np.float16)[:, :, None].view(np.uint8)


def _nibbles(codes: NDArray[np.int8], top: int) -> Bytes:
    """codes [out, blocks, 32] → [out, blocks, 16]: the first half of a block in the low nibbles, the second in the high ones."""
    unsigned = (codes + np.int8(top)).view(np.uint8)
    packed = unsigned[:, :, : _BLOCK // 2] | (unsigned[:, :, _BLOCK // 2 :] << np.uint8(4))
    return packed.astype(np.uint8)
