"""Identifiers: a prefix that says what is meant, and 26 characters that sort by the time they were made.

That time is the process's own, so it decides nothing: what is newer, the database's time says. Neighbours in time stay neighbours in an index.
"""

import secrets
import threading
import time

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford base 32, lower case
_lock = threading.Lock()
_last = 0


def new_id(prefix: str) -> str:
    """Return e.g. `job_01jd…`: 48 bits of milliseconds and 80 random bits, as in ULID.

    Within one millisecond of one process the bits count up from the random start, so that the order of making is kept.
    """
    global _last
    number = (time.time_ns() // 1_000_000) << 80 | secrets.randbits(80)
    with _lock:
        number = _last = number if number >> 80 > _last >> 80 else _last + 1
    return f"{prefix}_" + "".join(_ALPHABET[(number >> shift) & 31] for shift in range(125, -1, -5))
