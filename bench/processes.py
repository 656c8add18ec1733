"""The CPU time of a process and its descendants."""

from contextlib import suppress

import psutil


def cpu_seconds(pid: int) -> float:
    """CPU seconds of a process and all its descendants, including those that have ended. The kernel counts in hundredths of a second.

    The time of a process that has ended is added to its parent when the parent waits for it. A job's inner process is a child of an outer
    process, which waits for it at the end.
    """
    main = psutil.Process(pid)
    total = 0.0
    for process in (main, *main.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):  # it has ended since it was listed, and its parent counts it
            total += sum(process.cpu_times()[:4])  # user and system, of itself and of ended children
    return total
