"""The k-quants: blocks of 256 weights whose scales and minima are quantized themselves.

Each sub-block of a block searches the range with the least rounding error. An error counts more for a large weight, because large weights
contribute more to an output. The layouts are those of ggml's `ggml-common.h`.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

_CHUNK = 4096  #: blocks that are encoded together; their candidates stay in the processor's cache


def encode_q4_k(blocks: Floats) -> Bytes:
    """blocks [N, 256] → [N, 144]: d, dmin, 8 scales and minima of 6 bits, codes of 4 bits."""
    return _in_chunks(blocks, lambda part: _encode_with_minima(part, bits=4))


def encode_q5_k(blocks: Floats) -> Bytes:
    """blocks [N, 256] → [N, 176]: as Q4_K, with the fifth bits of all codes stored before the lower four."""
    return _in_chunks(blocks, lambda part: _encode_with_minima(part, bits=5))


def encode_q6_k(blocks: Floats) -> Bytes:
    """blocks [N, 256] → [N, 210]: the codes' low 4 bits, their high 2, 16 scales of 8 bits, d."""
    return _in_chunks(blocks, _encode_symmetric)


def _in_chunks(blocks: Floats, encode: Callable[[Floats], Bytes]) -> Bytes:
    parts = [encode(blocks[at : at + _CHUNK].astype(np.float32)) for at in range(0, len(blocks), _CHUNK)]
    return np.concatenate(parts)


def _encode_with_minima(blocks: Floats, *, bits: int) -> Bytes:
    count, top = len(blocks), 2**bits - 1
    parts = blocks.reshape(count, 8, 32)
    scale, least = _best_range(parts, top)  # [N, 8] each, neither negative: w ≈ scale · code − least
    d, scales = _six_bits(scale)
    dmin, minima = _six_bits(least)
    step = d.astype(np.float32)[:, None] * scales
    lowest = dmin.astype(np.float32)[:, None] * minima
    exact = _divide(parts + lowest[:, :, None], step[:, :, None])
    codes = np.clip(np.rint(exact), 0, top).astype(np.uint8)  # [N, 8, 32]
    pairs = codes.reshape(count, 4, 2, 32)
    low = (pairs[:, :, 0] & 15) | (pairs[:, :, 1] << 4)  # [N, 4, 32]
    fields = [d[:, None].view(np.uint8), dmin[:, None].view(np.uint8), _pack_six_bits(scales, minima)]
    if bits == 5:
        # Bit j of byte i is the fifth bit of code i of sub-block j.
        shifts = np.arange(8, dtype=np.uint8)[None, :, None]
        fields.append(np.bitwise_or.reduce((codes >> 4) << shifts, axis=1))
    return np.concatenate([*fields, low.reshape(count, 128)], axis=1)


def _best_range(parts: Floats, top: int) -> tuple[Floats, Floats]:
    """Return the scale and the minimum with the least weighted error. parts [N, 8, 32] → [N, 8] twice.

    Each of several candidates is refitted by least squares.
    """
    power = np.sqrt((parts**2).mean(axis=2, keepdims=True))
    weight = power + np.abs(parts)
    total = weight.sum(axis=2)
    sum_x = (weight * parts).sum(axis=2)
    low = np.minimum(parts.min(axis=2), 0)
    high = np.maximum(parts.max(axis=2), low)
    best_scale, best_least = (high - low) / top, -low
    best = _range_error(parts, weight, best_scale, best_least, top)
    for spread in np.linspace(-1.0, 1.0, 17):
        tried = _divide((top + spread) * np.ones_like(low), high - low)
        codes = np.clip(np.rint((parts - low[:, :, None]) * tried[:, :, None]), 0, top)
        sum_q, sum_qq = (weight * codes).sum(axis=2), (weight * codes * codes).sum(axis=2)
        sum_xq = (weight * codes * parts).sum(axis=2)
        spread_q = total * sum_qq - sum_q * sum_q
        scale = _divide(total * sum_xq - sum_x * sum_q, spread_q)
        least = -_divide(sum_qq * sum_x - sum_q * sum_xq, spread_q)
        # The format can't store a minimum above zero. The minimum is then zero, and only the scale is fitted.
        through_zero = least < 0
        scale = np.where(through_zero, _divide(sum_xq, sum_qq), scale)
        least = np.where(through_zero, 0, least)
        error = _range_error(parts, weight, scale, least, top)
        better = (error < best) & (scale > 0)
        best = np.where(better, error, best)
        best_scale, best_least = np.where(better, scale, best_scale), np.where(better, least, best_least)
    return best_scale.astype(np.float32), best_least.astype(np.float32)


def _range_error(parts: Floats, weight: Floats, scale: Floats, least: Floats, top: int) -> Floats:
    codes = np.clip(np.rint(_divide(parts + least[:, :, None], scale[:, :, None])), 0, top)
    error: Floats = (weight * (scale[:, :, None] * codes - least[:, :, None] - parts) ** 2).sum(axis=2)
    return error


def _encode_symmetric(blocks: Floats) -> Bytes:
    count = len(blocks)
    parts = blocks.reshape(count, 16, 16)
    scale = _best_scale(parts)  # [N, 16], of either sign
    largest = np.take_along_axis(scale, np.abs(scale).argmax(axis=1)[:, None], axis=1)[:, 0]
    d = (-largest / 128).astype(np.float16)
    scales = np.clip(np.rint(_divide(scale, d.astype(np.float32)[:, None])), -128, 127).astype(np.int8)
    step = d.astype(np.float32)[:, None] * scales
    codes = np.clip(np.rint(_divide(parts, step[:, :, None])), -32, 31) + 32
    halves = codes.astype(np.uint8).reshape(count, 2, 4, 32)  # half, quarter, position
    low = (halves[:, :, :2] & 15) | ((halves[:, :, 2:] & 15) << 4)  # [N, 2, 2, 32]
    shifts = np.array([0, 2, 4, 6], np.uint8)[None, None, :, None]
    high = np.bitwise_or.reduce((halves >> 4) << shifts, axis=2)  # [N, 2, 32]
    fields = [low.reshape(count, 128), high.reshape(count, 64), scales.view(np.uint8), d[:, None].view(np.uint8)]
    return np.concatenate(fields, axis=1)


def _best_scale(parts: Floats) -> Floats:
    """Return the scale with the least weighted error, for codes −32 … 31. parts [N, 16, 16] → [N, 16]"""
    weight = parts * parts
    extreme = np.take_along_axis(parts, np.abs(parts).argmax(axis=2)[:, :, None], axis=2)[:, :, 0]
    best_scale = -extreme / 32
    best = np.full(best_scale.shape, np.inf, np.float32)
    for spread in np.linspace(-1.0, 1.0, 19):
        tried = _divide(-(32 + spread) * np.ones_like(extreme), extreme)
        codes = np.clip(np.rint(parts * tried[:, :, None]), -32, 31)
        scale = _divide((weight * codes * parts).sum(axis=2), (weight * codes * codes).sum(axis=2))
        error = (weight * (scale[:, :, None] * codes - parts) ** 2).sum(axis=2)
        better = error < best
        best, best_scale = np.where(better, error, best), np.where(better, scale, best_scale)
    return best_scale.astype(np.float32)


def _six_bits(values: Floats) -> tuple[NDArray[np.float16], Bytes]:
    """Quantize non-negative numbers [N, 8] to 6 bits → their unit, float16 [N], and multiples of the unit, 0 … 63 [N, 8]."""
    unit = (values.max(axis=1) / 63).astype(np.float16)
    multiples = np.rint(_divide(values, unit.astype(np.float32)[:, None]))
    return unit, np.clip(multiples, 0, 63).astype(np.uint8)


def _pack_six_bits(scales: Bytes, minima: Bytes) -> Bytes:
    """Pack scales and minima, [N, 8] each, into bytes [N, 12].

    Bytes 0–3 hold the first four scales in their low 6 bits, and bytes 4–7 the first four minima. The high 2 bits of these bytes are the
    high bits of the last four scales and minima. Bytes 8–11 hold the low 4 bits of the last four scales (low nibble) and minima (high
    nibble).
    """
    first = scales[:, :4] | ((scales[:, 4:] >> 4) << 6)
    second = minima[:, :4] | ((minima[:, 4:] >> 4) << 6)
    third = (scales[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4)
    return np.concatenate([first, second, third], axis=1)


def _divide(values: Floats, by: Floats) -> Floats:
    """values / by, and zero where `by` is zero."""
    quotient: Floats = np.divide(values, by, out=np.zeros(np.broadcast(values, by).shape, np.float32), where=by != 0)
    return quotient
