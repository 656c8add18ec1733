"""Reports a full disk as the same error everywhere."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from nightpress.core.errors import ErrorCode, NightpressError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  #: no space, a used-up quota, a limit on the size of one file


@contextmanager
def full_disk(message: str, hint: str) -> Iterator[None]:
    """Raise NightpressError(disk_full) with `message` and the system's reason if the disk is full. Other errors pass unchanged."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise NightpressError(ErrorCode.DISK_FULL, f"{message}: {error.strerror}.", hint=hint) from error
