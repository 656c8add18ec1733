"""Decides how many GPUs a job gets: what its recipe asks for, or, with `gpus: auto`, as many as are worth it."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from nightpress.core.recipes.placement import Need, Seat, time_text

#: Share of a further GPU's speed that arrives: two GPUs are 1.85 times as fast as one.
_ARRIVES = 0.85
#: Twice as many GPUs are taken from other jobs only if that saves this many seconds, and this share of the job's time.
_WORTH_S = 300.0
_WORTH_SHARE = 0.25


class GpuCount(NamedTuple):
    gpus: int  #: 0 on a processor
    reason: str  #: empty: nothing was asked for


class Spread(NamedTuple):
    """The time of a job on one GPU."""

    seconds: float
    spread_s: float  #: the part of it that several GPUs share
    passes: tuple[str, ...]  #: the names of these passes

    def on(self, gpus: int) -> float:
        """Return the seconds on so many GPUs."""
        return self.seconds - self.spread_s + self.spread_s / (1 + _ARRIVES * (gpus - 1))


def largest_host(fleet: Sequence[Seat]) -> int:
    """Return the most GPUs that one host of the fleet can give to a job; 0: no GPU worker is known."""
    return max((seat.gpus for seat in fleet if seat.queue == "gpu"), default=0)


def count_gpus(
    asked: Literal["auto"] | int, time: Spread, need_on: Callable[[int], Need], fleet: Sequence[Seat]
) -> GpuCount:
    """Return the GPUs of a job on the queue `gpu`, and why.

    time: of the job. need_on: returns what the job needs on so many GPUs. fleet: the workers that were seen lately.
    """
    largest = largest_host(fleet)
    if asked != "auto":
        return GpuCount(asked, "" if asked == 1 else f"`gpus: {asked}`, as the recipe says{_waits(asked, largest)}.")
    if not time.passes:
        return GpuCount(
            1, "`gpus: auto` comes to 1: several GPUs speed up passes that share out their work, and it has none."
        )
    if largest < 2:
        seen = "the largest host seen lately has 1 GPU" if largest else "no GPU worker has been seen lately"
        return GpuCount(1, f"`gpus: auto` comes to 1: {seen}.")
    gpus, ended = 1, f"the largest host seen lately has {largest}"
    while 2 * gpus <= largest:
        need = need_on(2 * gpus)
        if not any(seat.queue == "gpu" and seat.holds(need.memory_bytes, need.gpu_bytes, 2 * gpus) for seat in fleet):
            ended = f"no host with {2 * gpus} seen lately has the memory"
            break
        saved = time.on(gpus) - time.on(2 * gpus)
        if saved < _WORTH_S or saved < _WORTH_SHARE * time.on(gpus):
            ended = f"{2 * gpus} would save {time_text(saved)} of {time_text(time.on(gpus))}"
            break
        gpus *= 2
    took = f"it takes about {time_text(time.on(1))} on one"
    if gpus > 1:
        took += f" and {time_text(time.on(gpus))} on {gpus}"
    return GpuCount(gpus, f"`gpus: auto` comes to {gpus}: {took}; {ended}.")


def _waits(asked: int, largest: int) -> str:
    """The note that no known host has so many GPUs; empty if one has, or none is known."""
    return f"; the largest host seen lately has {largest}, so it waits for a larger one" if 0 < largest < asked else ""
