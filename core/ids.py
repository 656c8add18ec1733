"""Identifiers: a prefix that names the kind of thing, and 26 characters that sort by the time of creation.

The time comes from the process's own clock, so nothing is decided by it: order and age come from the database's clock. Sorting by time
keeps rows that were created together close together in an index.
"""

import secrets
import threading
import time

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford base 32, lower case
_lock = threading.Lock()
_last = 0


def new_id(prefix: str) -> str:
    """Return e.g. `job_01jd…`: 48 bits of milliseconds and 80 random bits, as in ULID.

    Within one millisecond of one process, each identifier is its predecessor plus 1, so that they sort in order of creation.
    """
    global _last
    number = (time.time_ns() // 1_000_000) << 80 | secrets.randbits(80)
    with _lock:
        number = _last = number if number >> 80 > _last >> 80 else _last + 1
    return f"{prefix}_" + "".join(_ALPHABET[(number >> shift) & 31] for shift in range(125, -1, -5))
