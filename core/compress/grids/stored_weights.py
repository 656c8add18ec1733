"""Decodes the codes of other libraries' quantized checkpoints into floats, a range of a weight's rows at a time."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from nightpress.core.compress.grids.grid import E2M1
from nightpress.core.compress.grids.packing import unpack_bits
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.stored_forms import Coding, StoredWeight

#: Place of each of eight codes in a word of AutoAWQ's layout `gemm`.
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


class Parts(Protocol):
    """The tensors that store a weight."""

    def whole(self, role: str) -> Tensor | None:
        """The tensor of a role, or None. Kept after the first call."""

    def rows(self, role: str, first: int, count: int) -> Tensor:
        """Rows of a tensor, seen as a matrix whose rows are its last dimension."""


def row_step(weight: StoredWeight) -> int:
    """Chunks of the weight start at multiples of this number of rows."""
    if weight.coding == "experts":
        return weight.shape[1]
    return 2 if weight.coding == "bnb4" else 1


def decode_rows(weight: StoredWeight, parts: Parts, first: int, count: int) -> Tensor:
    """Decode rows of a weight, seen as a matrix: float32 [count, in]. Raises NightpressError(malformed_model) if its parts don't fit."""
    try:
        return _DECODERS[weight.coding](weight, parts, first, count)
    except (RuntimeError, IndexError, ValueError, TypeError, ArithmeticError) as error:
        raise NightpressError(
            ErrorCode.MALFORMED_MODEL,
            f"The stored form of {weight.name} can't be read: {str(error)[:200]}",
            hint="Fetch the model again; else bring the float model that it was made from.",
        ) from error


def _need(parts: Parts, role: str) -> Tensor:
    found = parts.whole(role)
    if found is None:
        raise ValueError(f"its {role} is missing")
    return found


def as_scale(stored: Tensor) -> Tensor:
    """Scales in float32. Bytes are exponents of two (e8m0): 2^(b − 127)."""
    if stored.dtype == torch.uint8:
        return torch.exp2(stored.float() - 127.0)
    return stored.float()


def _scaled(weight: StoredWeight, parts: Parts, first: int, count: int) -> Tensor:
    rows, columns = weight.shape[-2:]
    experts = weight.shape[0] if len(weight.shape) == 3 else 1
    codes = parts.rows("codes", first, count).float()
    scale = as_scale(_need(parts, "scale"))
    zero_point = parts.whole("zero_point")
    at = torch.arange(first, first + count)
    wide = _spread(scale, weight, experts, at, rows, columns)
    if zero_point is not None:
        codes -= _spread(zero_point.float(), weight, experts, at, rows, columns)
    return codes * wide


def _spread(scale: Tensor, weight: StoredWeight, experts: int, at: Tensor, rows: int, columns: int) -> Tensor:
    """A value for each code of the rows `at`: [count, columns] or [count, 1]. scale: one of all shapes that a scale may have."""
    count = scale.numel() // experts
    if count == 1:
        grid = (1, 1)
    elif scale.dim() < 2 or (scale.shape[-1] == 1 and count == rows):
        grid = (rows, 1)
    else:
        grid = (int(scale.shape[-2]), int(scale.shape[-1]))
    if grid[0] * grid[1] * experts != scale.numel():
        raise ValueError(f"its scale has the shape {list(scale.shape)}")
    high, wide = _block(weight, grid, rows, columns)
    flat = scale.reshape(experts * grid[0], grid[1])
    chosen = flat[(at // rows) * grid[0] + (at % rows) // high]
    return chosen if grid[1] == 1 else chosen.repeat_interleave(wide, 1)[:, :columns]


def _block(weight: StoredWeight, grid: tuple[int, int], rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    if weight.block is not None:
        high, wide = weight.block
        if (-(-rows // high), -(-columns // wide)) == grid:
            return high, wide
    if rows % grid[0] or columns % grid[1]:
        raise ValueError(f"{rows} × {columns} codes don't divide into {grid[0]} × {grid[1]} blocks")
    return rows // grid[0], columns // grid[1]


def _packed(weight: StoredWeight, parts: Parts, first: int, count: int) -> Tensor:
    """compressed-tensors' `pack-quantized`."""
    rows, columns = weight.shape
    codes = unpack_bits(parts.rows("codes", first, count), weight.bits, columns).float()
    scale = _need(parts, "scale").float().reshape(-1, _need(parts, "scale").shape[-1])
    if scale.shape[0] == 1:
        scale = scale.expand(rows, -1)
    scale, zero_point = scale[first : first + count], parts.whole("zero_point")
    index = parts.whole("group_index")
    groups = index.long() if index is not None else _groups(columns, scale.shape[1])
    if zero_point is not None:
        points = unpack_bits(zero_point.t().contiguous(), weight.bits, rows).t()[first : first + count]
        codes -= points.float()[:, groups]
    return codes * scale[:, groups]


def _groups(columns: int, count: int) -> Tensor:
    """The group of each column: consecutive columns of equal number."""
    if columns % count:
        raise ValueError(f"{columns} columns don't divide into {count} groups")
    return torch.arange(columns) // (columns // count)


def _fp4(weight: StoredWeight, parts: Parts, first: int, count: int) -> Tensor:
    """nvfp4 and mxfp4: two numbers of e2m1 a byte, the first in the low bits."""
    codes = _e2m1(parts.rows("codes", first, count))
    scale = as_scale(_need(parts, "scale")[first : first + count])
    divisor, factor = parts.whole("divisor"), parts.whole("factor")
    if divisor is not None:
        scale = scale / divisor.float()
    if factor is not None:
        scale = scale * factor.float()
    return codes * scale[:, _groups(weight.shape[1], scale.shape[1])]


def _e2m1(packed: Tensor) -> Tensor:
    numbers = torch.tensor([*E2M1, *(-number for number in E2M1)])
    places = torch.stack((packed & 0xF, packed >> 4), dim=-1).view(len(packed), -1)
    return torch.index_select(numbers, 0, places.view(-1).int()).view(places.shape)


def _experts(weight: StoredWeight, parts: Parts, first: int, count: int) -> Tensor:
    """gpt-oss: whole experts. Codes [rows, groups · 16] of an expert become [inputs, rows]."""
    _, inputs, rows = weight.shape
    groups = inputs // 32
    made = []
    for expert in range(first // inputs, (first + count) // inputs):
        codes = _e2m1(parts.rows("codes", expert * rows * groups, rows * groups))  # [rows · groups, 32]
        scale = as_scale(parts.rows("scale", expert * rows, rows)).view(-1, 1)
        made.append((codes * scale).view(rows, inputs).t())
    return torch.cat(made)


def _gptq(weight: StoredWeight, parts: Parts, first: int, count: int) -> Tensor:
    """AutoGPTQ: codes [in · bits / 32, out], zero points [groups, out · bits / 32], scales [groups, out]."""
    outputs, inputs = weight.shape
    half = 2 ** (weight.bits - 1)  # unpack_bits returns signed codes
    words = _need(parts, "codes")[:, first : first + count].t().contiguous()
    codes = unpack_bits(words, weight.bits, inputs).float() + half
    zeros = unpack_bits(_need(parts, "zero_point"), weight.bits, outputs)[:, first : first + count].float() + half
    zeros += weight.zero_offset
    scale = _need(parts, "scale")[:, first : first + count].float()
    index = parts.whole("group_index")
    groups = index.long() if index is not None else _groups(inputs, len(scale))
    floats: Tensor = (codes - zeros.t()[:, groups]) * scale.t()[:, groups]
    return floats


def _awq(weight: StoredWeight, parts: Parts, first: int, count: int) -> Tensor:
    """AutoAWQ's `gemm`: codes [in, out / 8], zero points [groups, out / 8] (none: 8), scales [groups, out]."""
    inputs = weight.shape[1]
    words = slice(first // 8, -(-(first + count) // 8))
    inside = slice(first - 8 * words.start, first - 8 * words.start + count)
    codes = _awq_codes(_need(parts, "codes")[:, words])[:, inside].t()
    scale = _need(parts, "scale")[:, first : first + count].float().t()
    groups, stored = _groups(inputs, scale.shape[1]), parts.whole("zero_point")
    if stored is None:
        return (codes - 8) * scale[:, groups]
    zeros = _awq_codes(stored[:, words])[:, inside].t()
    return (codes - zeros[:, groups]) * scale[:, groups]


def _awq_codes(words: Tensor) -> Tensor:
    shifts = torch.tensor([4 * place for place in _AWQ_PLACES], dtype=torch.int32)
    return ((words[:, :, None] >> shifts) & 0xF).view(len(words), -1).float()


def _bnb4(weight: StoredWeight, parts: Parts, first: int, count: int) -> Tensor:
    """bitsandbytes' nf4 and fp4: two numbers a byte, the first in the high bits; a magnitude for each block of the flattened weight."""
    columns = weight.shape[1]
    begin, end = first * columns, (first + count) * columns
    packed = _need(parts, "codes").reshape(-1)[begin // 2 : -(-end // 2)]
    places = torch.stack((packed >> 4, packed & 0xF), dim=-1).view(-1)[: end - begin]
    magnitudes = _need(parts, "absmax")
    if parts.whole("nested_absmax") is not None:
        outer = _need(parts, "nested_absmax").repeat_interleave(weight.details["nested_blocksize"])[: len(magnitudes)]
        magnitudes = _need(parts, "nested_quant_map")[magnitudes.int()] * outer + weight.details["nested_offset"]
    blocks = torch.arange(begin, end) // weight.details["blocksize"]
    values: Tensor = _need(parts, "quant_map")[places.int()] * magnitudes.float()[blocks]
    return values.view(count, columns)


def _bnb8(_weight: StoredWeight, parts: Parts, first: int, count: int) -> Tensor:
    """LLM.int8(): a row's largest magnitude is the code 127."""
    return parts.rows("codes", first, count).float() * (
        _need(parts, "scale").float()[first : first + count, None] / 127
    )


_DECODERS: dict[Coding, Callable[[StoredWeight, Parts, int, int], Tensor]] = {
    "scaled": _scaled,
    "packed": _packed,
    "fp4": _fp4,
    "experts": _experts,
    "gptq": _gptq,
    "awq": _awq,
    "bnb4": _bnb4,
    "bnb8": _bnb8,
}
