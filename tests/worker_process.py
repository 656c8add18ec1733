"""`python tests/worker_process.py BEHAVIOUR`: the real worker, whose children behave as tests/children.py says."""

import sys
from pathlib import Path

from core.logs import configure_logging
from core.settings import load_settings
from worker.app import run_worker

if __name__ == "__main__":
    settings = load_settings()
    configure_logging(settings.log_level, settings.log_format)
    children = str(Path(__file__).parent / "children.py")
    run_worker(settings, child_command=[sys.executable, "-P", children, sys.argv[1]])
