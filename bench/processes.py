"""What a process and all that it started have used."""

from contextlib import suppress

import psutil


def cpu_seconds(pid: int) -> float:
    """CPU seconds of a process and of everything below it, ended processes included. The kernel counts in hundredths.

    What has ended counts for its parent as soon as that has collected it. A job's child runs below an outer process, which collects it last.
    """
    main = psutil.Process(pid)
    total = 0.0
    for process in (main, *main.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):  # it has ended since it was listed: its parent counts it
            total += sum(process.cpu_times()[:4])  # its own, and that of ended processes below it: user and system
    return total
