"""Encode weights as GGUF's blocks of bytes: codes that a pass chose are stored unchanged, floats are rounded to nearest.

A row is divided into blocks of 32 or 256 consecutive weights. The layouts are those of ggml's `ggml-common.h`.
"""

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray

from nightpress.core.compress.grids.gguf_ranges import round_to_blocks
from nightpress.core.compress.grids.pressed_weights import Codes
from nightpress.core.recipes.gguf_types import GGUF_TYPES, gguf_type

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Type = GGMLQuantizationType

_BLOCK = 32


def type_named(name: str) -> GGMLQuantizationType:
    """`q4_k` → GGMLQuantizationType.Q4_K"""
    return GGMLQuantizationType[name.upper()]


def fitting_type(wanted: GGMLQuantizationType, columns: int) -> GGMLQuantizationType:
    """Return `wanted`, or the type that replaces it in rows of so many columns."""
    name = wanted.name.lower()
    if name not in GGUF_TYPES:
        return wanted
    kind = gguf_type(name, columns)
    return Type.F16 if kind is None else type_named(kind.name)


def encode(weight: Floats, kind: GGMLQuantizationType) -> Bytes:
    """Encode a weight [out, in] as bytes [out, bytes per row].

    K-quants search the range of each block with the least rounding error. Other types are encoded as in ggml's reference.
    """
    if kind.name.endswith("_K"):
        return round_to_blocks(torch.from_numpy(weight), GGUF_TYPES[kind.name.lower()]).to_bytes().numpy()
    encoded: Bytes = np.ascontiguousarray(quants.quantize(weight, kind)).view(np.uint8)
    return encoded


def codes_type(bits: int, group_size: int, *, symmetric: bool) -> GGMLQuantizationType | None:
    """Return the layout that holds a pass's codes unchanged: Q4_0 up to 4 bits, Q4_1 with zero points; Q8_0 for symmetric 8 bits.

    None if there is no such layout: group sizes that 32 does not divide, 5 to 7 bits, asymmetric 8 bits.
    """
    if group_size % _BLOCK:
        return None
    if bits <= 4:
        return Type.Q4_0 if symmetric else Type.Q4_1
    return Type.Q8_0 if bits == 8 and symmetric else None


def encode_codes(weight: Codes) -> Bytes:
    """Encode codes in the layout that `codes_type` returns → [out, bytes per row]. The codes are unchanged; the scales become float16.

    A layout has one scale for each 32 weights, so the scale of a larger group is repeated.
    """
    blocks = weight.in_blocks(_BLOCK)
    rows, count = blocks.scale.shape
    codes = blocks.codes.reshape(rows, count, _BLOCK)
    scale = _half(blocks.scale)
    if weight.bits == 8:
        return np.concatenate([scale, codes.view(np.uint8)], axis=2).reshape(rows, -1)
    if blocks.zero_point is None:
        return np.concatenate([scale, _nibbles(codes, 8)], axis=2).reshape(rows, -1)
    # A weight in Q4_1 is scale · code + minimum, with codes from 0 up.
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
