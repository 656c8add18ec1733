"""How a job ended, as an error, for pipelines that stop when a result is not good enough."""

from nightpress.client.errors import ClientError
from nightpress.core.wire.jobs import JobView


class JobFailedError(ClientError):
    """The job failed or was cancelled."""


class GateMissedError(ClientError):
    """The job succeeded, but its result misses a gate of its recipe."""


def ensure_accepted(job: JobView) -> JobView:
    """Return a job that has ended, if its result was accepted. Raises JobFailedError or GateMissedError."""
    if job.state != "succeeded":
        error = job.error or {}
        raise JobFailedError(
            f"Job {job.id} {'failed' if job.state == 'failed' else f'is {job.state}'}: {error.get('message', 'no error was reported')}",
            hint=str(error.get("hint") or f"`nightpress logs {job.id}` shows its log."),
        )
    if job.verdict == "rejected":
        raise GateMissedError(
            f"Job {job.id}: its result misses a gate.", hint=f"`nightpress report {job.id}` says which."
        )
    return job
