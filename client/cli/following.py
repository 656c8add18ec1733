"""Waiting for a job: a progress bar on a terminal, a line for each phase elsewhere, and an exit status at the end."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.progress import Progress, TaskID

from nightpress.client.cli import output
from nightpress.client.cli.exits import Exit
from nightpress.client.client import Client
from nightpress.core.wire.jobs import JobView


class _Notices:
    """Prints a job's notice each time that it changes."""

    def __init__(self) -> None:
        self._printed: str | None = None

    def __call__(self, job: JobView) -> None:
        if job.notice is not None and job.notice != self._printed:
            output.note(output.clean(job.notice), "yellow")
        self._printed = job.notice


class _ProgressPrinter:
    """Prints the progress of a job: on a bar, or without one a line for each phase. `since`: the time that counts as 0 s."""

    def __init__(self, progress: Progress | None, since: float) -> None:
        self._notices = _Notices()
        self._progress = progress
        self._task: TaskID | None = None
        self._last: tuple[object, ...] = ()
        self._since = since

    def __call__(self, job: JobView) -> None:
        self._notices(job)
        title = output.clean(describe(job))
        if self._progress is not None:
            if self._task is None:
                self._task = self._progress.add_task(title, total=1.0, message="")
            eta = f"about {output.duration_text(job.eta_s)} left  " if job.eta_s else ""
            self._progress.update(
                self._task, description=title, completed=job.progress, message=eta + output.clean(job.message)[:60]
            )
            return
        now = (job.state, job.phase, job.attempt, job.pass_index)
        if now != self._last:
            self._last = now
            output.note(f"{time.monotonic() - self._since:5.1f} s  {title}")


def describe(job: JobView) -> str:
    """State, phase and attempt in a few words."""
    if job.notice is not None:
        return f"{job.state} (no {job.queue} worker)"
    if job.state != "running":
        return f"{job.state} ({job.verdict})" if job.verdict else job.state
    text = job.phase or "starting"
    return text if job.attempt <= 1 else f"{text} (attempt {job.attempt})"


@contextmanager
def detach_on_interrupt(job_id: str) -> Iterator[None]:
    """At Ctrl-C, end the command and let the job go on."""
    try:
        yield
    except KeyboardInterrupt:
        output.note(
            f"\nDetached. Job {job_id} goes on: `nightpress watch {job_id}` shows it again, `nightpress cancel {job_id}` stops it."
        )
        raise typer.Exit(Exit.DETACHED) from None


def follow(client: Client, job_id: str, *, quiet: bool = False, timeout_s: float | None = None) -> JobView:
    """Wait for a job's end and return it. Prints progress unless `quiet`. Ctrl-C detaches. Raises TimeoutError after `timeout_s`."""
    with detach_on_interrupt(job_id):
        return show(client, job_id, quiet=quiet, timeout_s=timeout_s)


def show(
    client: Client, job_id: str, *, quiet: bool, timeout_s: float | None = None, since: float | None = None
) -> JobView:
    """As `follow`, without the detaching. `since`: the time that the printed seconds count from."""
    if quiet:
        return client.jobs.wait(job_id, timeout_s=timeout_s, on_update=_Notices())
    since = since or time.monotonic()
    if not output.stderr().is_terminal:
        return client.jobs.wait(job_id, timeout_s=timeout_s, poll_s=0.5, on_update=_ProgressPrinter(None, since))
    with output.job_progress() as progress:
        return client.jobs.wait(job_id, timeout_s=timeout_s, poll_s=0.4, on_update=_ProgressPrinter(progress, since))


def exit_of(job: JobView) -> Exit:
    """The exit status for a finished job."""
    if job.state != "succeeded":
        return Exit.JOB_FAILED
    return Exit.REJECTED if job.verdict == "rejected" else Exit.OK


def print_end(job: JobView) -> None:
    """Print how a finished job ended and what to do next."""
    took = ""
    if job.started_at and job.finished_at:
        took = f" after {output.duration_text((job.finished_at - job.started_at).total_seconds())}"
    if job.state == "succeeded" and job.verdict == "accepted":
        output.say(f"{job.id} succeeded{took}; every gate was met.", "green")
    elif job.state == "succeeded":
        output.say(f"{job.id} succeeded{took}, but its result was rejected: it misses a gate of the recipe.", "yellow")
    elif job.state == "cancelled":
        output.say(f"{job.id} was cancelled{took}.", "yellow")
    else:
        output.say(f"{job.id} failed{took}.", "red")
    if job.error:
        output.fail(
            f"{job.error.get('code', 'internal')}: {job.error.get('message', '')}", str(job.error.get("hint", ""))
        )
    if job.state == "succeeded":
        output.note(f"Report: nightpress report {job.id}    artifacts: nightpress pull {job.id}", "dim")
    elif job.state == "failed":
        output.note(f"Log: nightpress logs {job.id}    retry: nightpress retry {job.id}", "dim")
