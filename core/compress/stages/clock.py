"""Tracks a job's progress: its phase, the seconds of each phase, and a fraction that never decreases."""

import threading
import time
from collections.abc import Callable
from itertools import pairwise

from nightpress.core.handoff.frames import Frame, Phase, Progress, Span

Emit = Callable[[Frame], None]
Report = Callable[[float, str], None]  #: (fraction of a part of the job, what the job does now)


class Clock:
    """Sends phases and progress as frames. Several threads may call its methods."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._lock = threading.Lock()
        self._started = self._phase_started = time.monotonic()
        self._phase_started_ns = time.time_ns()
        self._phase: Phase = "validating"
        self._fraction = 0.0
        self.seconds: dict[str, float] = {}  #: by phase

    def enter(self, phase: Phase) -> None:
        """Begin a phase and end the previous one. If it is the present phase, that phase continues."""
        now = time.monotonic()
        with self._lock:
            self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + now - self._phase_started
            self._phase_started = now
            if phase == self._phase:
                return
            self.close()
            self._phase, self._phase_started_ns = phase, time.time_ns()

    def close(self) -> None:
        """Send a span for the present phase: it began at its start and ends now."""
        self._emit(Span(name=self._phase, started_ns=self._phase_started_ns, ended_ns=time.time_ns()))

    def at(self, fraction: float, message: str, *, pass_index: int | None = None) -> None:
        """Send the progress: the fraction of the whole job that is done, and what the job does now."""
        with self._lock:
            self._fraction = max(self._fraction, min(fraction, 1.0))
            spent = time.monotonic() - self._started
            eta = spent * (1 - self._fraction) / self._fraction if self._fraction > 0.05 else None
            frame = Progress(
                phase=self._phase, fraction=self._fraction, pass_index=pass_index, message=message[:300], eta_s=eta
            )
        self._emit(frame)

    def span(self, start: float, end: float, *, pass_index: int | None = None) -> Report:
        """A progress function for a part of the job: maps the part's 0…1 to the job's fractions `start`…`end`."""
        return lambda fraction, message: self.at(
            start + (end - start) * min(max(fraction, 0.0), 1.0), message, pass_index=pass_index
        )


def parts(start: float, end: float, count: int) -> list[tuple[float, float]]:
    """Divide the fractions from `start` to `end` into `count` equal parts: (start, end) of each."""
    edges = [start + (end - start) * at / max(count, 1) for at in range(count + 1)]
    return list(pairwise(edges))
