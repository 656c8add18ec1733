"""How long a test waits on a machine that does other work too."""

import os
from pathlib import Path


def slowness() -> float:
    """How many times longer things take than on a quiet machine: tasks that want a processor, by processor, at least 1.

    The larger of the last minute's mean and of what is seen now. Waits and promised times are multiplied by it.
    """
    mean, _, _ = os.getloadavg()
    try:
        runnable = int(Path("/proc/loadavg").read_text().split()[3].split("/")[0])
    except OSError:  # no Linux
        runnable = 0
    return max(1.0, max(mean, runnable) / (os.cpu_count() or 1))
