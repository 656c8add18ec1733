"""How long a test waits on a machine that does other work too."""

import os
from pathlib import Path


def slowness() -> float:
    """How many times longer things take than on an idle machine: runnable tasks per processor, at least 1.

    Uses the larger of the last minute's mean and the current number. Tests multiply their waits and time limits by it.
    """
    mean, _, _ = os.getloadavg()
    try:
        runnable = int(Path("/proc/loadavg").read_text().split()[3].split("/")[0])
    except OSError:  # not on Linux
        runnable = 0
    return max(1.0, max(mean, runnable) / (os.cpu_count() or 1))
