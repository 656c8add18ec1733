"""`python tests/worker_process.py BEHAVIOUR` runs the real worker, whose children run the function BEHAVIOUR of tests/children.py.

NIGHTPRESS_TEST_CLOCK is the number of seconds by which the worker's clock is ahead. With `jumping`, the clock is right, an hour ahead
or an hour behind, in turn at each reading.
"""

import itertools
import os
import sys
import time
from pathlib import Path

from nightpress.core.logs import configure_logging
from nightpress.core.settings import load_settings
from nightpress.worker.app import run_worker


def put_clock_wrong(by: str) -> None:
    right, hours = time.time, itertools.cycle((0, 3600, -3600))
    time.time = lambda: right() + (next(hours) if by == "jumping" else float(by))
    time.time_ns = lambda: int(time.time() * 1e9)


if __name__ == "__main__":
    if "NIGHTPRESS_TEST_CLOCK" in os.environ:
        put_clock_wrong(os.environ["NIGHTPRESS_TEST_CLOCK"])
    settings = load_settings()
    configure_logging(settings.log_level, settings.log_format)
    children = str(Path(__file__).parent / "children.py")
    run_worker(settings, child_command=[sys.executable, "-P", children, sys.argv[1]])
