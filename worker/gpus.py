"""Which of a host's GPUs this process may use: what NVML lists, less what CUDA_VISIBLE_DEVICES hides."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pynvml


class GpuError(Exception):
    """NVML is not there, or does not answer."""


@dataclass(frozen=True)
class Gpu:
    """A GPU, or an instance of one that is divided (MIG)."""

    uuid: str  #: `GPU-…` or `MIG-…`
    name: str
    memory: int  #: bytes
    instances: tuple["Gpu", ...] = ()  #: where it is divided


def visible_gpus(gpus: Sequence[Gpu], asked: str | None) -> list[Gpu]:
    """The GPUs that CUDA shows a process with this CUDA_VISIBLE_DEVICES, in its order. The first is the one that a job runs on.

    gpus: in the order of their PCI buses, as indices count them. asked: None where it is not set, which hides none; else indices, UUIDs or
    beginnings of UUIDs. As in CUDA, the first entry that names no GPU, or several, hides all that follow; an entry twice hides all. A
    divided GPU can't be used whole: its index or UUID means its first instance.
    """
    if asked is None:
        return [usable for gpu in gpus if (usable := _usable(gpu)) is not None]
    chosen: list[Gpu] = []
    for entry in asked.split(","):
        found = _named(gpus, entry.strip())
        if found is None:
            break
        if found in chosen:
            return []
        chosen.append(found)
    return chosen


def _usable(gpu: Gpu) -> Gpu | None:
    return gpu if not gpu.instances else gpu.instances[0]


def _named(gpus: Sequence[Gpu], entry: str) -> Gpu | None:
    if entry.isdecimal():
        return _usable(gpus[int(entry)]) if int(entry) < len(gpus) else None
    if entry.startswith("GPU-"):
        found = [gpu for gpu in gpus if gpu.uuid.startswith(entry)]
    elif entry.startswith("MIG-"):
        found = [instance for gpu in gpus for instance in gpu.instances if instance.uuid.startswith(entry)]
    else:
        return None
    return _usable(found[0]) if len(found) == 1 else None


def list_gpus() -> list[Gpu]:
    """This host's GPUs, or those that a container was given. Raises GpuError."""
    with _nvml():
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [_gpu(handle, _instances(handle)) for handle in handles]


def memory_used(uuid: str) -> int:
    """Bytes of a GPU's memory that are in use, by whoever uses them. Raises GpuError."""
    with _nvml():
        return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByUUID(uuid)).used)


@contextmanager
def _nvml() -> Iterator[None]:
    try:
        pynvml.nvmlInit()
        try:
            yield
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        raise GpuError(f"NVML says: {error}") from error


def _gpu(handle: Any, instances: tuple[Gpu, ...] = ()) -> Gpu:
    memory = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
    return Gpu(str(pynvml.nvmlDeviceGetUUID(handle)), str(pynvml.nvmlDeviceGetName(handle)), memory, instances)


def _instances(handle: Any) -> tuple[Gpu, ...]:
    try:
        divided = pynvml.nvmlDeviceGetMigMode(handle)[0] == pynvml.NVML_DEVICE_MIG_ENABLE
    except pynvml.NVMLError:  # a GPU that can't be divided
        return ()
    found = []
    for index in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle) if divided else 0):
        try:
            found.append(_gpu(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)))
        except pynvml.NVMLError:  # so many there could be; this one is not
            continue
    return tuple(found)
