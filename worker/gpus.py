"""The GPUs of the host that this process may use: those that NVML lists, without those that CUDA_VISIBLE_DEVICES hides."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pynvml


class GpuError(Exception):
    """NVML is not installed, or fails."""


@dataclass(frozen=True)
class Gpu:
    """A GPU, or an instance of a divided GPU (MIG)."""

    uuid: str  #: `GPU-…` or `MIG-…`
    name: str
    memory: int  #: bytes
    instances: tuple["Gpu", ...] = ()  #: its instances, if it is divided


def offered_gpus(gpus: Sequence[Gpu], asked: str | None) -> list[Gpu]:
    """The GPUs that a worker with this value of CUDA_VISIBLE_DEVICES offers to jobs: those that CUDA would show to it.

    asked: None if the variable is not set. Then all GPUs are offered, and all instances of divided GPUs: CUDA would show one instance of
    each, but every job sees only the instance that it is given.
    """
    if asked is not None:
        return visible_gpus(gpus, asked)
    return [usable for gpu in gpus for usable in gpu.instances or (gpu,)]


def visible_gpus(gpus: Sequence[Gpu], asked: str | None) -> list[Gpu]:
    """The GPUs that CUDA shows to a process with this value of CUDA_VISIBLE_DEVICES, in its order.

    gpus: in the order of their PCI buses, which the indices refer to. asked: None if the variable is not set, which hides no GPU; else
    indices, UUIDs or prefixes of UUIDs, separated by commas. As in CUDA, an entry that matches no GPU or several GPUs hides itself and all
    entries after it, and a GPU that is named twice hides all. A divided GPU can't be used as a whole: its index or UUID means its first
    instance.
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
    """The GPUs of this host, or of this container. Raises GpuError."""
    with _nvml():
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [_gpu(handle, _instances(handle)) for handle in handles]


def memory_used(uuids: Sequence[str]) -> list[int]:
    """Bytes of each GPU's memory that all processes use. Raises GpuError."""
    with _nvml():
        handles = [pynvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids]
        return [int(pynvml.nvmlDeviceGetMemoryInfo(handle).used) for handle in handles]


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
        except pynvml.NVMLError:  # the count is a maximum: no instance has this index
            continue
    return tuple(found)
