"""Describes the machine that a job ran on: what a reader needs to judge the job's figures, or to measure them again."""

import contextlib
import gc
import os
import platform
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from nightpress.core.handoff.spec import JobSpec
from nightpress.core.processor import cpu_features, processor


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
        **({"processes": spec.processes} if spec.processes > 1 else {}),
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


def wake_gpu() -> None:
    """Start CUDA and the libraries that the passes use, in a thread: that takes seconds, in which others read files.

    While this process uses the GPU, the driver stays loaded for those that it starts.
    """

    def wake() -> None:
        import torch

        with contextlib.suppress(RuntimeError):  # whatever uses the GPU first raises it again
            small = torch.eye(16, device="cuda")
            torch.linalg.cholesky(small @ small)
            torch.cuda.synchronize()

    threading.Thread(target=wake, name="wake-gpu", daemon=True).start()


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
