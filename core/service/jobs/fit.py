"""Whether a worker that was seen lately could hold a job."""

from collections.abc import Sequence

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.gpu_count import largest_host
from nightpress.core.recipes.placement import Seat
from nightpress.core.recipes.plan import Plan


def check_fit(plan: Plan, fleet: Sequence[Seat]) -> None:
    """Raise NightpressError(cannot_fit) if no worker seen lately has the memory for the job.

    If no worker is known, or none has so many GPUs, accept the job: it waits for a worker that has them.
    """
    assert plan.estimate is not None
    seats = [seat for seat in fleet if seat.queue == plan.queue]
    need, gpu_need = plan.estimate.memory_bytes, plan.estimate.gpu_bytes
    if plan.gpus > largest_host(seats) or not seats or any(seat.holds(need, gpu_need, plan.gpus) for seat in seats):
        return
    largest = max(seat.memory for seat in seats)
    if largest >= need:
        largest_gpu = max(seat.gpu_memory or 0 for seat in seats)
        raise NightpressError(
            ErrorCode.CANNOT_FIT,
            f"The job needs about {gpu_need / 1e9:.1f} GB of a GPU's memory; the largest GPU of a worker that could hold it has {largest_gpu / 1e9:.1f} GB.",
            hint="Start a worker with a larger GPU, use fewer or shorter calibration samples, or set `device: cpu`.",
            needs=gpu_need,
            largest=largest_gpu,
        )
    fitting = next((variant for variant in plan.estimate.leaner if variant.memory_bytes <= largest), None)
    advice = "Start a" if fitting is None else f"Give the recipe {fitting.change}, or start a"
    raise NightpressError(
        ErrorCode.CANNOT_FIT,
        f"The job needs about {need / 1e9:.1f} GB of memory; the largest {plan.queue} worker offers {largest / 1e9:.1f} GB.",
        hint=f"{advice} worker that offers {-(-need // 2**30)} GiB, or raise NIGHTPRESS_WORKER_MEMORY if one has more than it offers.",
        needs=need,
        largest=largest,
    )
