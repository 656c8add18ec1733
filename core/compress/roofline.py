"""A device's peak rates for the roofline model: floating-point operations and bytes per second.

This machine's rates are measured. Those of other devices come from their makers' data sheets.
"""

import time
from collections.abc import Callable, Mapping

import torch

from nightpress.core.recipes.profile import Device

#: Dense fp16/bf16 operations per second and memory bandwidth in bytes per second, from the makers' data sheets.
KNOWN: Mapping[str, Device] = {
    "h100": Device(name="NVIDIA H100 SXM, bf16 (data sheet)", flops_per_s=989e12, bytes_per_s=3.35e12),
    "a100": Device(name="NVIDIA A100 SXM 80 GB, bf16 (data sheet)", flops_per_s=312e12, bytes_per_s=2.04e12),
    "rtx-4090": Device(name="NVIDIA RTX 4090, bf16 (data sheet)", flops_per_s=165e12, bytes_per_s=1.01e12),
}
_SECONDS = 0.4  #: for each of the two probes
_GEMM = {"cpu": 1024, "cuda": 8192}
_FLOATS = {"cpu": 32 * 1024**2, "cuda": 256 * 1024**2}  #: numbers to copy: far more than a cache holds


def device_of(name: str, *, device: str = "cpu", threads: int = 1) -> Device | None:
    """The device that a recipe names. `this` is measured; `none` gives None."""
    if name == "none":
        return None
    return KNOWN[name] if name != "this" else probe(device, threads)


def probe(device: str, threads: int) -> Device:
    """Measure this machine with a square matrix product (fp32 on a CPU, bf16 on a GPU) and with the scaled copy of the STREAM benchmark.

    Each is the fastest of several runs.
    """
    on_gpu = device == "cuda"
    if not on_gpu:
        torch.set_num_threads(threads)
    size = _GEMM[device]
    dtype = torch.bfloat16 if on_gpu else torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    flops = 2 * size**3 / _best(lambda: torch.mm(left, right, out=product), on_gpu)
    numbers = torch.ones(_FLOATS[device], device=device)
    copy = torch.empty_like(numbers)
    moved = 2 * numbers.nbytes / _best(lambda: torch.mul(numbers, 3.0, out=copy), on_gpu)
    name = torch.cuda.get_device_name() if on_gpu else f"this processor, {threads} thread{'s' * (threads > 1)}"
    return Device(name=f"{name}, {'bf16' if on_gpu else 'fp32'} (measured)", flops_per_s=flops, bytes_per_s=moved)


def _best(run: Callable[[], object], on_gpu: bool) -> float:
    """Seconds of the fastest run: other load on the machine can only make a run slower."""
    best = float("inf")
    deadline = time.perf_counter() + _SECONDS
    run()
    while time.perf_counter() < deadline or best == float("inf"):
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if on_gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best
