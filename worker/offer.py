"""What this machine, or this container's share of it, can offer to jobs."""

import logging
import os
import socket
import subprocess
from importlib.metadata import version
from pathlib import Path

import psutil

from core.errors import ErrorCode, NightpressError
from core.jobs.records import Worker, WorkerOffer
from core.settings import Settings

log = logging.getLogger(__name__)

_SHARE = 0.8  #: of the memory; the rest is for the supervisor, the page cache and neighbours
_MIB = 1024**2
_CGROUP = Path("/sys/fs/cgroup")


def make_offer(settings: Settings, worker_id: str) -> WorkerOffer:
    """Raises NightpressError(invalid_request) where a worker for `gpu` finds no GPU."""
    return WorkerOffer(
        worker_id=worker_id,
        queue=settings.worker_queue,
        device=_gpu_name() if settings.worker_queue == "gpu" else "cpu",
        memory=settings.worker_memory or int(_SHARE * _memory()),
        threads=settings.worker_threads or _cores(),
    )


def introduce(offer: WorkerOffer, *, draining: bool, unfit: str | None = None) -> Worker:
    """The row by which others know this worker, as it is now."""
    gpu_memory, gpu_memory_used = _gpu_memory() if offer.queue == "gpu" else (None, None)
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
        gpu_memory=gpu_memory,
        gpu_memory_used=gpu_memory_used,
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


def _ask_gpu(fields: str) -> list[str]:
    """What nvidia-smi says of the first GPU. Raises OSError or SubprocessError where it can't."""
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    return [value.strip() for value in said.split("\n")[0].split(",")]


def _gpu_memory() -> tuple[int | None, int | None]:
    """Bytes of the GPU's memory and of what is in use; None where it doesn't say, which stops no work."""
    try:
        total, used = _ask_gpu("memory.total,memory.used")
        return int(total) * _MIB, int(used) * _MIB
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        log.warning("nvidia-smi does not say how much memory is in use: %s", error)
        return None, None


def _gpu_name() -> str:
    try:
        return _ask_gpu("name")[0]
    except (OSError, subprocess.SubprocessError) as error:
        raise NightpressError(
            ErrorCode.INVALID_REQUEST,
            f"This worker is to serve the queue gpu, but nvidia-smi finds no GPU: {error}.",
            hint="Set NIGHTPRESS_WORKER_QUEUE=cpu, or give the process a GPU.",
        ) from error
