"""Codes of 1 to 8 bits as one stream of bits in 32-bit words, the lowest first, on any device: the layout of `pack-quantized`."""

import torch
from torch import Tensor


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes int8 [rows, columns] from −2^(bits−1) up → int32 [rows, ⌈columns·bits/32⌉]. What fills the last word up is zero."""
    rows, columns = codes.shape
    padded = torch.zeros(rows, -(-columns // 32) * 32, dtype=torch.int32, device=codes.device)
    padded[:, :columns] = codes
    padded[:, :columns] += 2 ** (bits - 1)
    groups = padded.view(rows, -1, 32)  # 32 codes fill `bits` words
    words = torch.zeros(rows, groups.shape[1], bits, dtype=torch.int32, device=codes.device)
    for at in range(32):
        word, offset = divmod(at * bits, 32)
        words[:, :, word] |= groups[:, :, at] << offset
        if offset + bits > 32:
            words[:, :, word + 1] |= groups[:, :, at] >> (32 - offset)
    return words.view(rows, -1)[:, : -(-columns * bits // 32)].contiguous()


def unpack_bits(words: Tensor, bits: int, columns: int) -> Tensor:
    """The codes again: int8 [rows, columns]."""
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
