"""`python tests/control_process.py` runs the real control process. Its clock is NIGHTPRESS_TEST_CLOCK seconds ahead."""

import os
import sys

from nightpress.worker.control import main
from tests.worker_process import put_clock_wrong

if __name__ == "__main__":
    put_clock_wrong(os.environ["NIGHTPRESS_TEST_CLOCK"])
    sys.exit(main())
