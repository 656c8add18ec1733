"""The resources that this machine or container offers to jobs."""

import logging
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.service.jobs.host_claims import kinds_of, most_together
from nightpress.core.service.jobs.records import OfferedGpu, Worker, WorkerOffer
from nightpress.core.settings import Settings
from nightpress.worker.gpus import Gpu, GpuError, list_gpus, memory_used, offered_gpus

log = logging.getLogger(__name__)

#: fraction of the memory that is offered; the rest is for the supervisor, the page cache and other programs
_SHARE = 0.8
_DEVICE_LENGTH = 200  #: of the column
_CGROUP = Path("/sys/fs/cgroup")


def make_offer(settings: Settings, worker_id: str) -> WorkerOffer:
    """The worker's offer. Raises NightpressError(invalid_request) if a worker for the queue `gpu` finds no GPU."""
    on_gpus = settings.worker_queue == "gpu"
    gpus = tuple(OfferedGpu(gpu.uuid, gpu.name, gpu.memory) for gpu in _gpus()) if on_gpus else ()
    return WorkerOffer(
        worker_id=worker_id,
        queue=settings.worker_queue,
        device=", ".join(dict.fromkeys(gpu.name for gpu in gpus)) or "cpu",
        memory=settings.worker_memory or int(_SHARE * _memory()),
        threads=settings.worker_threads or _cores(),
        gpus=gpus,
        cpu_jobs=settings.worker_cpu_jobs if on_gpus else 0,
    )


def introduce(offer: WorkerOffer, *, draining: bool, unfit: str | None = None, vllm: bool = False) -> Worker:
    """This worker's current row in the roster. vllm: whether it has an environment with vLLM."""
    gpus = _with_memory_used(offer.gpus)
    largest = max(gpus, key=lambda gpu: int(gpu["memory"]), default={})
    kinds = [[memory, most_together(kind)] for (memory, _), kind in kinds_of(offer.gpus).items()]
    return Worker(
        id=offer.worker_id,
        host=socket.gethostname(),
        queue=offer.queue,
        device=offer.device[:_DEVICE_LENGTH],
        memory=offer.memory,
        threads=offer.threads_of(1),
        version=version("nightpress"),
        draining=draining,
        unfit=unfit,
        gpu_memory=largest.get("memory"),
        gpu_memory_used=largest.get("memory_used"),
        gpus=gpus or None,
        gpu_kinds=kinds or None,
        cpu_jobs=offer.cpu_jobs,
        vllm=vllm,
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


def _gpus() -> list[Gpu]:
    """The GPUs that this worker offers. Raises NightpressError(invalid_request) if there are none."""
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        there = list_gpus()
    except GpuError as error:
        raise _no_gpu(str(error), "Install NVIDIA's driver, or give the container a GPU.") from error
    offered = offered_gpus(there, asked)
    if offered:
        return offered
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


def _with_memory_used(gpus: Sequence[OfferedGpu]) -> list[dict[str, Any]]:
    """The GPUs, each with the bytes of its memory in use; None if NVML fails: the worker works without this figure."""
    used: Sequence[int | None]
    try:
        used = memory_used([gpu.uuid for gpu in gpus]) if gpus else []
    except GpuError as error:
        log.warning("How much of the GPUs' memory is in use is not known: %s", error)
        used = [None] * len(gpus)
    return [{**asdict(gpu), "memory_used": bytes_used} for gpu, bytes_used in zip(gpus, used, strict=True)]
