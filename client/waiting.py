"""How often a client asks for a job or a study that it waits for, and when it gives up."""

import time

from nightpress.client.errors import ApiError, UnreachableError


class Pace:
    """Seconds until the next request: short at first, up to `poll_s` later, 1 s while the server is away."""

    def __init__(self, timeout_s: float | None, poll_s: float, patience_s: float) -> None:
        self._start = time.monotonic()
        self._timeout_s = timeout_s
        self._poll_s = poll_s
        self._patience_s = patience_s
        self._away_since: float | None = None

    def after(self, noun: str, subject_id: str, state: str) -> float:
        """The pause after an answer. Raises TimeoutError when `timeout_s` is over."""
        self._away_since = None
        now = time.monotonic()
        if self._timeout_s is not None and now - self._start >= self._timeout_s:
            raise TimeoutError(f"{noun} {subject_id} is still {state} after {self._timeout_s:g} s; it goes on.")
        return min(self._poll_s, max(0.1, (now - self._start) / 10))

    def after_error(self, error: UnreachableError | ApiError) -> float:
        """The pause after an error. Raises it where it is final, or when the server has been away for `patience_s`."""
        if isinstance(error, ApiError) and error.status < 500:
            raise error
        now = time.monotonic()
        self._away_since = self._away_since or now
        if now - self._away_since > self._patience_s:
            raise error
        return 1.0
