"""Reports transferred bytes as the progress of a job."""

import time
from collections.abc import Callable

from nightpress.core.handoff.frames import Phase, Progress
from nightpress.worker.lease import LeaseKeeper
from nightpress.worker.metrics import BYTES_MOVED, SECONDS_MOVING


class Meter:
    """Reports transferred bytes as progress of a phase, between the fractions `low` and `high`."""

    def __init__(self, keeper: LeaseKeeper, check: Callable[[], None], phase: Phase, low: float, high: float) -> None:
        self._keeper = keeper
        self._check = check
        self._phase = phase
        self._low = low
        self._span = high - low
        self._total = 0
        self._done = 0
        self._told = 0.0
        self._moved_at = time.monotonic()

    def expect(self, total: int) -> None:
        self._total = max(total, 1)
        self._moved_at = time.monotonic()
        self._tell()

    def moved(self, count: int) -> None:
        self._check()
        self._done += count
        BYTES_MOVED.labels(self._phase).inc(count)
        now = time.monotonic()
        SECONDS_MOVING.labels(self._phase).inc(now - self._moved_at)
        self._moved_at = now
        if time.monotonic() - self._told > 0.5:
            self._tell()

    def _tell(self) -> None:
        self._told = time.monotonic()
        # A file that is fetched and then hashed is counted twice, so the sum may exceed the total.
        share = min(self._done / self._total, 1.0)
        megabytes = f"{min(self._done, self._total) / 1e6:.0f} of {self._total / 1e6:.0f} MB"
        self._keeper.progress(Progress(phase=self._phase, fraction=self._low + self._span * share, message=megabytes))
