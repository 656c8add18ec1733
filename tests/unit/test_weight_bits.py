"""The number of bits of a static int8 weight on a processor with or without VNNI."""

import pytest

from nightpress.core.compress.passes.static_int8 import weight_bits
from nightpress.core.recipes.passes import StaticInt8


@pytest.mark.parametrize(("isa", "bits"), [("AVX2", 7), ("AVX512_CORE", 7), ("AVX512_CORE_VNNI", 8)])
def test_weights_have_7_bits_where_the_processor_is_told_to_do_without_vnni(
    monkeypatch: pytest.MonkeyPatch, isa: str, bits: int
):
    monkeypatch.setattr(
        "nightpress.core.processor._cpuinfo",
        lambda _field: "avx2 avx512f avx512_vnni avx_vnni avx512_bf16 amx_int8",
    )
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
    assert weight_bits(StaticInt8()) == bits
