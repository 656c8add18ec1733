"""A weight in GGUF's blocks: codes and ranges as integers and float16 numbers, the floats that they stand for, and their bytes.

The floats are computed in the order in which ggml computes them, so they equal what llama.cpp dequantizes, bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray
from torch import Tensor

from nightpress.core.recipes.gguf_types import GgufType


@dataclass(frozen=True)
class BlockRanges:
    """The ranges of all blocks of a weight. Types whose scales are float16 have the multiples 1."""

    unit: Tensor  #: float16 [out, blocks]
    scales: Tensor  #: int32 [out, blocks, parts], in units
    least_unit: Tensor | None = None  #: float16 [out, blocks]; None: the type has no minima
    minima: Tensor | None = None  #: int32 [out, blocks, parts], in least units

    def scale(self) -> Tensor:
        """float32 [out, blocks, parts]"""
        return self.unit.float()[..., None] * self.scales.float()

    def minimum(self) -> Tensor | None:
        """What is subtracted from scale · code: float32 [out, blocks, parts]"""
        if self.least_unit is None or self.minima is None:
            return None
        return self.least_unit.float()[..., None] * self.minima.float()

    def choose(self, chosen: Tensor, other: "BlockRanges") -> "BlockRanges":
        """These ranges where `chosen` [out] or [out, blocks] is True, and those of `other` elsewhere."""
        unit, scales = _where(chosen, self.unit, other.unit), _where(chosen, self.scales, other.scales)
        if self.least_unit is None or self.minima is None or other.least_unit is None or other.minima is None:
            return BlockRanges(unit, scales)
        least_unit = _where(chosen, self.least_unit, other.least_unit)
        return BlockRanges(unit, scales, least_unit, _where(chosen, self.minima, other.minima))


def _where(chosen: Tensor, ours: Tensor, theirs: Tensor) -> Tensor:
    """`torch.where` for a condition with fewer dimensions, which are the first."""
    return torch.where(chosen.view(*chosen.shape, *[1] * (ours.dim() - chosen.dim())), ours, theirs)


@dataclass(frozen=True)
class BlockCoded:
    """A weight [out, in] in blocks."""

    kind: GgufType
    codes: Tensor  #: uint8 [out, in], from 0 up
    ranges: BlockRanges

    def dequantize(self) -> Tensor:
        """float32 [out, in]"""
        scale, minimum = self.ranges.scale(), self.ranges.minimum()
        steps = self.codes.float().view(*scale.shape, self.kind.part)
        if minimum is None:
            return ((steps - self.kind.half) * scale[..., None]).view(self.codes.shape)
        return (steps * scale[..., None] - minimum[..., None]).view(self.codes.shape)

    def choose_rows(self, chosen: Tensor, other: "BlockCoded") -> "BlockCoded":
        """The rows of this weight where `chosen` [out] is True, and the rows of `other` elsewhere."""
        codes = _where(chosen, self.codes, other.codes)
        return BlockCoded(self.kind, codes, self.ranges.choose(chosen, other.ranges))

    def to_bytes(self) -> Tensor:
        """The blocks as a file has them: uint8 [out, bytes of a row]."""
        count, block = len(self.codes), self.kind.block
        codes = self.codes.view(-1, block)
        fields = _PACKERS[self.kind.name](codes, self.ranges)
        return torch.cat(fields, dim=1).view(count, -1)


def read_blocks(blocks: NDArray[np.uint8], kind: GgufType) -> NDArray[np.float32]:
    """Return the floats [out, in] that a file's blocks [out, bytes of a row] stand for. Works for types with uneven grids, too."""
    found: NDArray[np.float32] = quants.dequantize(blocks, GGMLQuantizationType[kind.name.upper()])
    return found


def _half(values: Tensor | None) -> Tensor:
    """float16 [out, blocks] → its bytes [out · blocks, 2]"""
    assert values is not None
    return values.reshape(-1, 1).contiguous().view(torch.uint8)


def _parts(values: Tensor | None) -> Tensor:
    """Multiples [out, blocks, parts] → uint8 [out · blocks, parts]; a negative number becomes its two's complement."""
    assert values is not None
    return (values.flatten(0, 1) & 0xFF).to(torch.uint8)


def _joined(fields: Tensor, shifts: tuple[int, ...]) -> Tensor:
    """Shift fields [N, count, ...] of a few bits by their shift, and join them into bytes [N, ...]."""
    joined = fields[:, 0] << shifts[0]
    for at, shift in enumerate(shifts[1:], start=1):
        joined = joined | (fields[:, at] << shift)
    return joined


def _pack_small(codes: Tensor, ranges: BlockRanges) -> list[Tensor]:
    """q4_0, q4_1, q5_0, q5_1: the scale, the minimum, the fifth bits of all codes, the low nibbles of both halves."""
    fields = [_half(ranges.unit)]
    if ranges.least_unit is not None:
        fields.append(_half(-ranges.least_unit))  # the file's minimum is added
    return [*fields, _joined((codes & 15).view(-1, 2, 16), (0, 4))]


def _pack_small_five(codes: Tensor, ranges: BlockRanges) -> list[Tensor]:
    *fields, low = _pack_small(codes, ranges)
    fifth = _joined((codes >> 4).view(-1, 4, 8).transpose(1, 2), tuple(range(8)))  # bit i of the word belongs to code i
    return [*fields, fifth, low]


def _pack_q8_0(codes: Tensor, ranges: BlockRanges) -> list[Tensor]:
    return [_half(ranges.unit), codes ^ 128]  # signed: the code minus 128


def _pack_q2_k(codes: Tensor, ranges: BlockRanges) -> list[Tensor]:
    both = _parts(ranges.scales) | (_parts(ranges.minima) << 4)
    return [both, _two_bits(codes), _half(ranges.unit), _half(ranges.least_unit)]


def _pack_q3_k(codes: Tensor, ranges: BlockRanges) -> list[Tensor]:
    high = _joined((codes >> 2).view(-1, 8, 32), tuple(range(8)))
    scales = ranges.scales.flatten(0, 1) + 32
    low = _joined((scales & 15).view(-1, 2, 8), (0, 4))
    upper = _joined((scales >> 4).view(-1, 4, 4), (0, 2, 4, 6))
    packed = torch.cat([low, upper], dim=1).to(torch.uint8)
    return [high, _two_bits(codes & 3), packed, _half(ranges.unit)]


def _two_bits(codes: Tensor) -> Tensor:
    """Codes of 2 bits [N, 256] → [N, 64]: byte l of a half has the codes l, 32 + l, 64 + l and 96 + l of the half."""
    quarters = codes.view(-1, 2, 4, 32).transpose(1, 2)
    return _joined(quarters, (0, 2, 4, 6)).flatten(1)


def _pack_q4_k(codes: Tensor, ranges: BlockRanges) -> list[Tensor]:
    pairs = (codes & 15).view(-1, 4, 2, 32).transpose(1, 2)
    return [_half(ranges.unit), _half(ranges.least_unit), _six_bits(ranges), _joined(pairs, (0, 4)).flatten(1)]


def _pack_q5_k(codes: Tensor, ranges: BlockRanges) -> list[Tensor]:
    *fields, low = _pack_q4_k(codes, ranges)
    fifth = _joined((codes >> 4).view(-1, 8, 32), tuple(range(8)))  # bit j of byte i belongs to code i of part j
    return [*fields, fifth, low]


def _six_bits(ranges: BlockRanges) -> Tensor:
    """8 scales and 8 minima of 6 bits → bytes [N, 12].

    Bytes 0–3 hold the first four scales in their low 6 bits, and bytes 4–7 the first four minima. The high 2 bits of these bytes are the
    high bits of the last four scales and minima. Bytes 8–11 hold the low 4 bits of the last four scales (low nibble) and minima (high
    nibble).
    """
    scales, minima = _parts(ranges.scales), _parts(ranges.minima)
    first = scales[:, :4] | ((scales[:, 4:] >> 4) << 6)
    second = minima[:, :4] | ((minima[:, 4:] >> 4) << 6)
    third = (scales[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4)
    return torch.cat([first, second, third], dim=1)


def _pack_q6_k(codes: Tensor, ranges: BlockRanges) -> list[Tensor]:
    halves = codes.view(-1, 2, 4, 32)  # half, quarter, position
    low = (halves[:, :, :2] & 15) | ((halves[:, :, 2:] & 15) << 4)
    high = _joined((halves >> 4).transpose(1, 2), (0, 2, 4, 6))
    return [low.flatten(1), high.flatten(1), _parts(ranges.scales), _half(ranges.unit)]


_PACKERS: dict[str, Callable[[Tensor, BlockRanges], list[Tensor]]] = {
    "q2_k": _pack_q2_k,
    "q3_k": _pack_q3_k,
    "q4_k": _pack_q4_k,
    "q5_k": _pack_q5_k,
    "q6_k": _pack_q6_k,
    "q4_0": _pack_small,
    "q4_1": _pack_small,
    "q5_0": _pack_small_five,
    "q5_1": _pack_small_five,
    "q8_0": _pack_q8_0,
}
