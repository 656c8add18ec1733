"""The pauses between the attempts of a delivery: the retry schedule of Standard Webhooks."""

import random

#: Seconds after each failed attempt; three days in total.
PAUSES_S = (5.0, 300.0, 1800.0, 7200.0, 18000.0, 36000.0, 50400.0, 72000.0, 86400.0)
_JITTER = 0.2


def pause_after(attempts: int) -> float | None:
    """Seconds from the `attempts`-th attempt to the next; None: there is no next."""
    if attempts > len(PAUSES_S):
        return None
    return PAUSES_S[attempts - 1] * random.uniform(1 - _JITTER, 1 + _JITTER)
