"""Codes packed as a stream of bits."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

from nightpress.core.compress.grids.packing import pack, pack_bits, unpack_bits


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 31, 64, 100])
def test_the_words_are_those_of_the_format(bits: int, columns: int):
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, columns), dtype=torch.int8)
    words = pack_bits(codes, bits)
    assert torch.equal(words, pack_to_int32(codes, bits))
    assert torch.equal(unpack_bits(words, bits, columns), codes)
    if bits in (4, 8):
        assert torch.equal(words, pack(codes, bits))
