"""Chooses a job's queue, CPU or GPU: by the time that a GPU saves, the needed memory, and the workers of the fleet."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Queue = Literal["cpu", "gpu"]

#: A job takes a GPU from other jobs only if that saves this many seconds, and this share of its time on a processor.
_WORTH_S = 300.0
_WORTH_SHARE = 0.5
#: Number of threads in an estimate if no worker is known.
THREADS = 2


@dataclass(frozen=True)
class Seat:
    """The resources that a worker offers to a job."""

    queue: Queue
    memory: int  #: bytes of the host's memory
    threads: int = THREADS
    gpu_memory: int | None = None  #: bytes; None: no GPU, or a GPU that does not report its memory
    seen_s: float = 0.0  #: seconds since it was last seen
    vllm: bool = False  #: whether its jobs also run artifacts in vLLM
    gpus: int = 1  #: the most GPUs of this memory that one job can have; means nothing on the queue `cpu`

    def holds(self, memory: int, gpu_memory: int, gpus: int = 1) -> bool:
        """Return whether a job with these needs in bytes fits. gpu_memory: of each of its GPUs."""
        if self.queue == "gpu" and gpus > self.gpus:
            return False
        return memory <= self.memory and (self.gpu_memory is None or gpu_memory <= self.gpu_memory)


class Need(NamedTuple):
    """The memory and time of a job on a processor, or on a GPU."""

    memory_bytes: int
    gpu_bytes: int
    seconds: float


class Placement(NamedTuple):
    queue: Queue
    reason: str


def threads_of(fleet: Collection[Seat], queue: Queue) -> int:
    """Return the smallest number of threads that a job in this queue can have."""
    return min((seat.threads for seat in fleet if seat.queue == queue), default=THREADS)


def place(on_cpu: Need, on_gpu: Need, fleet: Sequence[Seat]) -> Placement:
    """Choose the queue of a job whose passes can run on both.

    A job that gains much by a GPU prefers the GPU; any other prefers a processor. It goes to the other queue only if no worker of the
    preferred queue can hold it. If no worker is known, the preference alone decides.
    """
    saved = on_cpu.seconds - on_gpu.seconds
    gains = saved >= _WORTH_S and saved >= _WORTH_SHARE * on_cpu.seconds
    both = f"it takes about {time_text(on_gpu.seconds)} on a GPU and {time_text(on_cpu.seconds)} on a processor"
    cpus, gpus = ([seat for seat in fleet if seat.queue == queue] for queue in ("cpu", "gpu"))
    fits_cpu = any(seat.holds(on_cpu.memory_bytes, 0) for seat in cpus)
    fits_gpu = any(seat.holds(on_gpu.memory_bytes, on_gpu.gpu_bytes) for seat in gpus)
    if gains:
        if fits_gpu:
            return Placement("gpu", f"{both}.")
        if not fleet:
            return Placement("gpu", f"{both}; no worker has been seen lately.")
        return Placement("cpu", f"{_why_no_gpu(on_gpu, gpus)}; {both}.")
    why = (
        f"a GPU would save {time_text(saved)} of {time_text(on_cpu.seconds)}"
        if saved >= 1
        else "it gains nothing by a GPU"
    )
    if fits_gpu and not fits_cpu:
        missing = "no processor's worker can hold it" if cpus else "no processor's worker has been seen lately"
        return Placement("gpu", f"{why}, but {missing}.")
    return Placement("cpu", f"{why}.")


def _why_no_gpu(need: Need, gpus: Sequence[Seat]) -> str:
    if not gpus:
        return "no GPU worker has been seen lately"
    largest = max(gpus, key=lambda seat: (seat.gpu_memory or 0, seat.memory))
    if largest.gpu_memory is not None and largest.gpu_memory < need.gpu_bytes:
        return (
            f"it needs {_size(need.gpu_bytes)} of a GPU's memory, and the largest GPU has {_size(largest.gpu_memory)}"
        )
    most = max(seat.memory for seat in gpus)
    return (
        f"beside a GPU it needs {_size(need.memory_bytes)} of memory, and the GPU workers offer {_size(most)} at most"
    )


def time_text(seconds: float) -> str:
    """Return seconds in the unit that suits them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
