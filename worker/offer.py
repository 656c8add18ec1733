"""What this machine, or this container's share of it, can offer to jobs."""

import os
import socket
import subprocess
from importlib.metadata import version
from pathlib import Path

import psutil

from core.errors import ErrorCode, NightpressError
from core.jobs.records import Worker, WorkerOffer
from core.settings import Settings

_SHARE = 0.8  #: of the memory; the rest is for the supervisor, the page cache and neighbours
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


def introduce(offer: WorkerOffer, *, draining: bool) -> Worker:
    """The row by which others know this worker."""
    return Worker(
        id=offer.worker_id,
        host=socket.gethostname(),
        queue=offer.queue,
        device=offer.device,
        memory=offer.memory,
        threads=offer.threads,
        version=version("nightpress"),
        draining=draining,
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


def _gpu_name() -> str:
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        names = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")
    except (OSError, subprocess.SubprocessError) as error:
        raise NightpressError(
            ErrorCode.INVALID_REQUEST,
            f"This worker is to serve the queue gpu, but nvidia-smi finds no GPU: {error}.",
            hint="Set NIGHTPRESS_WORKER_QUEUE=cpu, or give the process a GPU.",
        ) from error
    return names[0].strip()
