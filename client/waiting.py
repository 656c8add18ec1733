"""How a client waits for a job: what both clients share around their `sleep`."""

import time

from nightpress.client.errors import ApiError, UnreachableError
from nightpress.core.wire.jobs import JobView


class Pace:
    """When to ask again for a job that is awaited: often at first, seldom later, patiently while the server is away."""

    def __init__(self, timeout_s: float | None, poll_s: float, patience_s: float) -> None:
        self._start = time.monotonic()
        self._timeout_s = timeout_s
        self._poll_s = poll_s
        self._patience_s = patience_s
        self._away_since: float | None = None

    def after(self, job: JobView) -> float:
        self._away_since = None
        now = time.monotonic()
        if self._timeout_s is not None and now - self._start >= self._timeout_s:
            raise TimeoutError(f"Job {job.id} is still {job.state} after {self._timeout_s:g} s; it goes on.")
        return min(self._poll_s, max(0.1, (now - self._start) / 10))

    def after_error(self, error: UnreachableError | ApiError) -> float:
        if isinstance(error, ApiError) and error.status < 500:
            raise error
        now = time.monotonic()
        self._away_since = self._away_since or now
        if now - self._away_since > self._patience_s:
            raise error
        return 1.0
