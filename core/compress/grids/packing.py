"""Codes as bits in 32-bit words, the lowest bits first: the layout of compressed-tensors' `pack-quantized`."""

import torch
from torch import Tensor

from nightpress.core.compress.grids.workspace import Workspace


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack codes of 1 to 8 bits on any device.

    Codes int8 [rows, columns] from −2^(bits−1) up → int32 [rows, ⌈columns·bits/32⌉]. The unused bits of the last word are zero.
    """
    rows, columns = codes.shape
    padded = torch.zeros(rows, -(-columns // 32) * 32, dtype=torch.int32, device=codes.device)
    padded[:, :columns] = codes
    padded[:, :columns] += 2 ** (bits - 1)
    if 32 % bits == 0:  # a word holds whole codes
        shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=codes.device)
        words = (padded.view(rows, -1, 32 // bits) << shifts).sum(2, dtype=torch.int32)
        return words[:, : -(-columns * bits // 32)].contiguous()
    groups = padded.view(rows, -1, 32)  # 32 codes fill `bits` words
    words = torch.zeros(rows, groups.shape[1], bits, dtype=torch.int32, device=codes.device)
    for at in range(32):
        word, offset = divmod(at * bits, 32)
        words[:, :, word] |= groups[:, :, at] << offset
        if offset + bits > 32:
            words[:, :, word + 1] |= groups[:, :, at] >> (32 - offset)
    return words.view(rows, -1)[:, : -(-columns * bits // 32)].contiguous()


def unpack_bits(words: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack_bits`: returns the codes, int8 [rows, columns]."""
    rows = len(words)
    padded = torch.zeros(rows, -(-columns // 32) * bits, dtype=torch.int32, device=words.device)
    padded[:, : words.shape[1]] = words
    groups = padded.view(rows, -1, bits)
    codes = torch.empty(rows, groups.shape[1], 32, dtype=torch.int8, device=words.device)
    mask = 2**bits - 1
    for at in range(32):
        word, offset = divmod(at * bits, 32)
        value = (groups[:, :, word] >> offset) & (mask if offset + bits <= 32 else 2 ** (32 - offset) - 1)
        if offset + bits > 32:
            value |= (groups[:, :, word + 1] << (32 - offset)) & mask
        codes[:, :, at] = value - 2 ** (bits - 1)
    return codes.view(rows, -1)[:, :columns]


def pack(codes: Tensor, bits: int, workspace: Workspace | None = None) -> Tensor:
    """Pack codes of 4 or 8 bits on a little-endian CPU. Codes int8 [out, in] → int32 [out, ⌈in·bits/32⌉].

    Returns the same words as `pack_bits`, several times faster: on such a CPU the words are the unsigned codes in their order. The result
    is a view of `workspace`. Raises ValueError for other numbers of bits.
    """
    if bits not in (4, 8):
        raise ValueError(f"codes of {bits} bits are not packed here")
    workspace = workspace or Workspace()
    rows, columns = codes.shape
    per_word = 32 // bits
    padded = -(-columns // per_word) * per_word
    unsigned = workspace.take("unsigned", (rows, padded), torch.uint8)
    torch.add(codes.view(torch.uint8), 2 ** (bits - 1), out=unsigned[:, :columns])
    if padded > columns:
        unsigned[:, columns:] = 0
    if bits == 8:
        return unsigned.view(torch.int32)
    pairs = unsigned.view(torch.int16)  # the even column in the low byte, the odd one in the high byte
    merged = torch.bitwise_right_shift(pairs, 4, out=workspace.take("pairs", tuple(pairs.shape), torch.int16))
    merged |= pairs
    packed = workspace.take("packed", (rows, padded // 2), torch.uint8)
    return packed.copy_(merged).view(torch.int32)


def pack_zero_points(zero_point: Tensor, bits: int) -> Tensor:
    """Zero points int8 [out, groups] → int32 [⌈out·bits/32⌉, groups]: packed along the output dimension, as `pack-quantized` requires."""
    return pack(zero_point.t().contiguous(), bits).t().contiguous()
