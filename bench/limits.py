"""A limit for the time of a measurement, so that one that hangs leaves the others their time."""

import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType

from nightpress.core.compress.ranks.launch import Ranks


class CutOffError(Exception):
    """A measurement took longer than its limit."""


@contextlib.contextmanager
def limited(what: str, seconds: float, ranks: Ranks | None = None) -> Iterator[None]:
    """Raise CutOffError in this context after `seconds`. Before, `ranks` write to stderr where they are. For the main thread."""

    def cut(_signal: int, _frame: FrameType | None) -> None:
        if ranks is not None:
            ranks.show_stacks()
            time.sleep(1.0)  # until they have written
        raise CutOffError(f"{what}: cut off after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, cut)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def say(text: str) -> None:
    """Write a line to stderr at once, so that it is there if this process is killed."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
