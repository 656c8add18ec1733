"""Keeps a lease: renews it, reports through it, and detects its loss. While a child runs, only this thread writes the job's row in SQL."""

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from nightpress.core.handoff.frames import Progress
from nightpress.core.service.jobs.records import Lease
from nightpress.core.service.jobs.store import JobStore
from nightpress.worker.metrics import PhaseClock

_LONGEST_INTERVAL_S = 2.0  #: longest time between renewals: a cancellation is noticed at the next one
_SHORTEST_INTERVAL_S = 0.5  #: shortest time between two reports of progress
_SHORTEST_PHASE_S = 0.05  #: shortest time before the report of a new phase
_LOG_BATCH = 200
_NOTES = 100
_LOG_LINES = 5000  #: most lines that are kept while the database does not answer; older lines are dropped

log = logging.getLogger(__name__)


class LeaseKeeper:
    """Renews a lease at least every quarter of its duration, in its own thread.

    `claimed_at`: the monotonic time before the claim was sent, so that the lease's end is never assumed too late.
    """

    def __init__(
        self, store: JobStore, lease: Lease, *, ttl_s: float, claimed_at: float, on_renewed: Callable[[], None]
    ) -> None:
        self._store = store
        self._lease = lease
        self._ttl_s = ttl_s
        self._on_renewed = on_renewed
        self._expires = claimed_at + ttl_s
        self._gone = False
        self._stop = False
        self._urgent = False
        self._new_phase = False
        self.cancel_requested = False
        self._progress: Progress | None = None
        self._phases = PhaseClock()
        self._lines: deque[tuple[str, str]] = deque(maxlen=_LOG_LINES)
        self._notes: deque[tuple[str, dict[str, Any]]] = deque(maxlen=_NOTES)
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._keep, name=f"lease-{lease.job_id}", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> bool:
        """Whether another worker may have the job by now: the database reported it, or did not answer before the lease's end."""
        return self._gone or time.monotonic() >= self._expires

    def progress(self, progress: Progress) -> None:
        self._phases.enter(progress.phase)
        with self._changed:
            self._new_phase |= self._progress is None or self._progress.phase != progress.phase
            self._progress, self._urgent = progress, True
            self._changed.notify()

    def log_line(self, level: str, text: str) -> None:
        with self._changed:
            self._lines.append((level, text))

    def note(self, kind: str, data: dict[str, Any]) -> None:
        """Queue an event for the job's history. Of several checkpoints in a row between two renewals, only the last is kept."""
        with self._changed:
            if self._notes and self._notes[-1][0] == kind == "checkpoint":
                self._notes.pop()
            self._notes.append((kind, data))

    def close(self) -> None:
        """Write all pending reports, then stop renewing."""
        self._phases.enter("")
        with self._changed:
            self._stop = True
            self._changed.notify()
        self._thread.join(timeout=max(self._expires - time.monotonic(), 0) + 1)

    def _keep(self) -> None:
        interval = min(self._ttl_s / 4, _LONGEST_INTERVAL_S)
        last = time.monotonic()
        while not self.lost:
            with self._changed:
                self._changed.wait_for(lambda: self._stop or self._urgent, timeout=interval)
                if self._urgent:  # wait a little, to report several changes together
                    self._changed.wait_for(lambda: self._stop, timeout=last + _SHORTEST_PHASE_S - time.monotonic())
                    self._changed.wait_for(
                        lambda: self._stop or self._new_phase, timeout=last + _SHORTEST_INTERVAL_S - time.monotonic()
                    )
                stop, self._urgent, self._new_phase = self._stop, False, False
            last = time.monotonic()
            try:
                self._renew()
                self._flush()
            except Exception as error:  # whatever the fault of the database, try until the lease's end
                log.warning("The lease of %s could not be renewed: %s", self._lease.job_id, error)
                time.sleep(random.uniform(0.1, min(1.0, self._ttl_s / 8)))
                continue  # also after `close`: pending reports must not be lost because the database does not answer now
            if stop:
                return

    def _renew(self) -> None:
        asked = time.monotonic()
        renewal = self._store.attempts.renew(self._lease, ttl_s=self._ttl_s, progress=self._progress)
        if not renewal.held:
            self._gone = True
            return
        self._expires = asked + self._ttl_s
        self.cancel_requested = renewal.cancel_requested
        self._on_renewed()

    def _flush(self) -> None:
        """Write the log lines first, then the events. So a checkpoint in the history means that the lines before it are stored too."""
        with self._changed:
            lines, notes = list(self._lines), list(self._notes)
            self._lines.clear()
            self._notes.clear()
        try:
            while lines and not self._gone:
                self._store.attempts.append_logs(self._lease, lines[:_LOG_BATCH])
                del lines[:_LOG_BATCH]
            while notes and not self._gone:
                self._store.attempts.record_event(self._lease, *notes[0])
                del notes[0]
        except Exception:
            with self._changed:  # put them back in order; a full deque drops the oldest entries, at its left end
                self._lines = deque([*lines, *self._lines], maxlen=_LOG_LINES)
                self._notes = deque([*notes, *self._notes], maxlen=_NOTES)
            raise
