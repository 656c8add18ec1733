"""Tells trackers what their outbox holds. A tracker that is down or slow delays nothing but its own rows."""

import logging
import time

from nightpress.core.service.dispatch.threads import Threads
from nightpress.core.service.trackers.contents import Contents
from nightpress.core.service.trackers.store import CLAIM_S, DueRun, TrackerStore
from nightpress.core.service.trackers.tracker import Run, RunDeletedError, Tracker

_AT_A_TIME = 4
_RUNNING_AGAIN_S = 30.0  #: between two looks at the curves of a job that runs
_SPARE_S = 30.0  #: a request that begins this long before the claim ends is over when it ends

log = logging.getLogger(__name__)


class TrackerCourier:
    """Tells one tracker, in threads. Any number of processes may do so at the same time."""

    def __init__(self, tracker: Tracker, store: TrackerStore, contents: Contents) -> None:
        self._tracker = tracker
        self._store = store
        self._contents = contents
        self._threads = Threads[DueRun](tracker.name, at_a_time=_AT_A_TIME)

    def deliver(self) -> int:
        """Start telling what is due, without waiting. Returns the number of rows."""
        return self._threads.start(
            lambda room: self._store.take_due(self._tracker.name, limit=room),
            self.attempt,
        )

    def close(self) -> None:
        self._threads.close()

    def attempt(self, due: DueRun) -> None:
        """Tell one row, and store that the tracker knows it, or when to try again."""
        began = time.monotonic()

        def check() -> None:
            if time.monotonic() - began > CLAIM_S - _SPARE_S:
                raise TimeoutError(f"the tracker did not take it in {CLAIM_S - _SPARE_S:g} s")

        run = self._contents.read(due.subject, after_line=due.lines)
        if run is None:
            self._store.drop(due)
            return
        try:
            run_id = due.run_id or self._begin(due, run)
            self._tracker.tell(run_id, run, check)
        except RunDeletedError:
            self._store.told(due, lines=run.lines, again_s=None)
        except Exception as error:
            # A tracker's library raises whatever it likes. Whatever it is, the row is told again later.
            log.warning("%s was not told of %s: %s", self._tracker.name, due.subject, error)
            self._store.failed(due, f"{type(error).__name__}: {error}")
        else:
            self._store.told(due, lines=run.lines, again_s=_RUNNING_AGAIN_S if run.state == "running" else None)

    def _begin(self, due: DueRun, run: Run) -> str:
        parent = None
        if run.parent is not None:
            parent = self._store.run_id(due.tracker, run.parent)
            if parent is None and self._contents.read(run.parent) is not None:
                raise RuntimeError(f"the run of the study {run.parent} has not begun there yet")
        run_id = self._tracker.begin(run, parent)
        self._store.begun(due, run_id, self._tracker.address(run, run_id))
        return run_id
