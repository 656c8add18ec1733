"""Describes the machine that a job ran on: what a reader needs to judge the job's figures, or to measure them again."""

import contextlib
import gc
import os
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nightpress.core.handoff.spec import JobSpec

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


def describe(spec: JobSpec, versions: dict[str, str]) -> dict[str, Any]:
    """Versions, processor, threads and memory. versions: those of the libraries, reported by the consumers' processes."""
    return {
        "nightpress": version_of("nightpress"),
        "versions": dict(sorted(versions.items())),
        "platform": platform.platform(),
        "cpu": processor(),
        "cpu_features": cpu_features(),
        "cores": os.cpu_count(),
        "threads": spec.threads,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": spec.device,
        "gpu": gpu(spec.device),
        "seed": spec.recipe.seed,
        "attempt": spec.attempt,
    }


def gpu(device: str) -> dict[str, Any] | None:
    """The GPU that the passes ran on. None on a CPU."""
    if device != "cuda":
        return None
    import torch

    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": found.name,
        "memory_bytes": found.total_memory,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def gpu_memory() -> int | None:
    """Bytes of memory of the GPU that a job in this process would use. None if torch finds no GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)


def free_gpu_memory() -> int:
    """Bytes of the GPU's memory that no process uses now."""
    import torch

    return int(torch.cuda.mem_get_info()[0])


def give_back_gpu_memory() -> None:
    """Return the GPU memory that torch keeps for later tensors in this process, so that a consumer's process can use it."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


@contextlib.contextmanager
def gpu_peak(device: str) -> Iterator[Callable[[], int | None]]:
    """Measure the peak of the GPU's memory. Yields a function that returns the peak of all tensors in bytes, or None on a CPU."""
    if device != "cuda":
        yield lambda: None
        return
    import torch

    torch.cuda.reset_peak_memory_stats()
    yield torch.cuda.max_memory_allocated


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _cpuinfo(field: str) -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == field:
                return value.strip()
    except OSError:
        pass
    return ""


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
