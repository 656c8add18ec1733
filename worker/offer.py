"""The resources that this machine or container offers to jobs."""

import logging
import os
import socket
from importlib.metadata import version
from pathlib import Path

import psutil

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.service.jobs.records import Worker, WorkerOffer
from nightpress.core.settings import Settings
from nightpress.worker.gpus import Gpu, GpuError, list_gpus, memory_used, visible_gpus

log = logging.getLogger(__name__)

#: fraction of the memory that is offered; the rest is for the supervisor, the page cache and other programs
_SHARE = 0.8
_CGROUP = Path("/sys/fs/cgroup")


def make_offer(settings: Settings, worker_id: str) -> WorkerOffer:
    """The worker's offer. Raises NightpressError(invalid_request) if a worker for the queue `gpu` finds no GPU."""
    gpu = _gpu() if settings.worker_queue == "gpu" else None
    return WorkerOffer(
        worker_id=worker_id,
        queue=settings.worker_queue,
        device="cpu" if gpu is None else gpu.name,
        memory=settings.worker_memory or int(_SHARE * _memory()),
        threads=settings.worker_threads or _cores(),
        gpu_memory=None if gpu is None else gpu.memory,
        gpu_uuid=None if gpu is None else gpu.uuid,
    )


def introduce(offer: WorkerOffer, *, draining: bool, unfit: str | None = None, vllm: bool = False) -> Worker:
    """This worker's current row in the roster. vllm: whether it has an environment with vLLM."""
    return Worker(
        id=offer.worker_id,
        host=socket.gethostname(),
        queue=offer.queue,
        device=offer.device,
        memory=offer.memory,
        threads=offer.threads,
        version=version("nightpress"),
        draining=draining,
        unfit=unfit,
        gpu_memory=offer.gpu_memory,
        vllm=vllm,
        gpu_memory_used=None if offer.gpu_uuid is None else _memory_used(offer.gpu_uuid),
    )


def _memory() -> int:
    total = int(psutil.virtual_memory().total)
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            return min(total, int((_CGROUP / name).read_text()))
        except (OSError, ValueError):  # no such cgroup, or "max"
            continue
    return total


def _cores() -> int:
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = (_CGROUP / "cpu.max").read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no such cgroup, or "max"
        return cores


def _gpu() -> Gpu:
    """The GPU that this worker's jobs run on. Raises NightpressError(invalid_request) if there is none."""
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        there = list_gpus()
    except GpuError as error:
        raise _no_gpu(str(error), "Install NVIDIA's driver, or give the container a GPU.") from error
    visible = visible_gpus(there, asked)
    if visible:
        return visible[0]
    if not there:
        raise _no_gpu("NVML lists none", "Give the process a GPU.")
    names = ", ".join(f"{gpu.uuid} ({gpu.name})" for gpu in there)
    raise _no_gpu(
        f"CUDA_VISIBLE_DEVICES={asked} leaves it none of {names}",
        "Name a GPU by its index or UUID, or unset the variable.",
    )


def _no_gpu(why: str, hint: str) -> NightpressError:
    return NightpressError(
        ErrorCode.INVALID_REQUEST,
        f"This worker is to serve the queue gpu, but it has no GPU: {why}.",
        hint=f"{hint} Or set NIGHTPRESS_WORKER_QUEUE=cpu.",
    )


def _memory_used(uuid: str) -> int | None:
    """Bytes of the GPU's memory in use. None if NVML fails: the worker works without this figure."""
    try:
        return memory_used(uuid)
    except GpuError as error:
        log.warning("How much of the GPU's memory is in use is not known: %s", error)
        return None
