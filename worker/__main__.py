"""`python -m nightpress.worker`: one worker for NIGHTPRESS_WORKER_QUEUE."""

import sys

from nightpress.core.errors import NightpressError
from nightpress.core.logs import configure_logging
from nightpress.core.settings import load_settings
from nightpress.worker import sandbox
from nightpress.worker.app import run_worker


def main() -> int:
    settings = load_settings()
    configure_logging(settings.log_level, settings.log_format)
    sandbox.hide_memory()
    try:
        run_worker(settings)
    except NightpressError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
