"""`python tests/api_process.py before|after`: the real API, which is killed at the first submission, before or after its commit."""

import os
import signal
import sys
from typing import Any

from api.__main__ import main
from core.jobs.store import JobStore

if __name__ == "__main__":
    submit = JobStore.submit

    def dying(*args: Any, **kwargs: Any) -> Any:
        if sys.argv[1] == "after":
            submit(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    JobStore.submit = dying  # type: ignore[method-assign]
    main()
