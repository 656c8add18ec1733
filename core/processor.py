"""The processor of this machine: its name, and the instruction sets on which the speed and the rounding of its arithmetic depend."""

import os
import platform
from pathlib import Path

_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")
_AMX = frozenset({"amx_int8", "amx_bf16"})
_AVX512_BF16 = _AMX | {"avx512_bf16"}
_VNNI_512 = _AVX512_BF16 | {"avx512_vnni"}
#: Value of ONEDNN_MAX_CPU_ISA → the processor features that oneDNN may then not use.
_HELD_DOWN = {
    "SSE41": _VNNI_512 | {"avx512f", "avx_vnni", "avx2"},
    "AVX": _VNNI_512 | {"avx512f", "avx_vnni", "avx2"},
    "AVX2": _VNNI_512 | {"avx512f", "avx_vnni"},
    "AVX2_VNNI": _VNNI_512 | {"avx512f"},
    "AVX2_VNNI_2": _VNNI_512 | {"avx512f"},
    "AVX512_CORE": _VNNI_512 | {"avx_vnni"},
    "AVX512_CORE_VNNI": _AVX512_BF16,
    "AVX512_CORE_BF16": _AMX,
    "AVX512_CORE_FP16": _AMX,
}


def processor() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """The instruction sets on which the speed of int8 and bfloat16 depends, without those that ONEDNN_MAX_CPU_ISA forbids.

    torch and OpenVINO obey that variable as well. ONNX Runtime has no such switch.
    """
    telling = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm", *_BFLOAT16)
    held_down = _HELD_DOWN.get(os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper(), frozenset())
    return [feature for feature in telling if feature in _processor_flags() - held_down]


def multiplies_bfloat16() -> bool:
    """Whether the processor has usable instructions for bfloat16, which multiply at least twice as fast as in float32."""
    return not set(_BFLOAT16).isdisjoint(cpu_features())


def bfloat16_held_down() -> bool:
    """Whether the processor has instructions for bfloat16 and ONEDNN_MAX_CPU_ISA forbids them."""
    return not _processor_flags().isdisjoint(_BFLOAT16) and not multiplies_bfloat16()


def _processor_flags() -> set[str]:
    return set((_cpuinfo("flags") or _cpuinfo("Features")).split())


def _cpuinfo(field: str) -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == field:
                return value.strip()
    except OSError:
        pass
    return ""
