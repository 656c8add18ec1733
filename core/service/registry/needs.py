"""What keeps a model or data set from being deleted: jobs that have not ended."""

from typing import Any

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.service.tables.jobs import jobs
from nightpress.core.wire.jobs import TERMINAL_STATES


def needed_by_a_job(noun: str, name: str) -> NightpressError:
    return NightpressError(
        ErrorCode.CONFLICT,
        f"A job that is queued or running needs the {noun} {name}.",
        hint="Cancel the job or wait for its end.",
    )


def live_jobs() -> Any:
    """The SQL condition that a job has not ended."""
    return jobs.c.state.not_in(sorted(TERMINAL_STATES))
