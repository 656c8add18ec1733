"""Commands about jobs: submit, watch, wait, ls, inspect, logs, cancel, retry."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from nightpress.client.cli import output
from nightpress.client.cli.cost import cost_text
from nightpress.client.cli.deliveries import TO
from nightpress.client.cli.exits import Exit
from nightpress.client.cli.following import describe, detach_on_interrupt, exit_of, follow, print_end
from nightpress.client.cli.models import BASE, send_model
from nightpress.client.cli.recipes import read_recipe
from nightpress.client.cli.session import Session, takes_session
from nightpress.client.client import Client
from nightpress.client.errors import ApiError
from nightpress.client.gates import with_gates
from nightpress.core.errors import ErrorCode
from nightpress.core.recipes.gates import read_gate
from nightpress.core.wire.jobs import JobFilter, JobView, LogView
from nightpress.core.wire.trackers import TrackedView

JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="The job's id.")]


def add_to(app: typer.Typer) -> None:
    for function in (submit, watch, wait, ls, inspect, logs, cancel, retry):
        app.command(function.__name__, rich_help_panel="Jobs")(takes_session(function))


def submit(
    session: Session,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model's id or name, or a local folder, which is sent first.")
    ],
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="A built-in recipe's name, or a YAML file.")],
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Show progress until the job ends.")] = False,
    gate: Annotated[
        list[str] | None,
        typer.Option(
            "--gate",
            "-g",
            metavar="GATE",
            help="A bound such as 'perplexity <= +1%', in place of the recipe's own for this figure; may be repeated. With --wait, the exit status is 3 if the result misses one.",
        ),
    ] = None,
    name: Annotated[str, typer.Option(help="A title for the job.")] = "",
    model_name: Annotated[
        str | None, typer.Option(help="The model's name at the server; otherwise its folder's.")
    ] = None,
    base: BASE = None,
    priority: Annotated[int, typer.Option(min=-100, max=100, help="Higher goes first.")] = 0,
    label: Annotated[
        list[str] | None, typer.Option("--label", "-l", metavar="K=V", help="A label; may be repeated.")
    ] = None,
    run_limit: Annotated[float | None, typer.Option(help="Seconds an attempt may run before it fails.")] = None,
    queue_limit: Annotated[
        float | None, typer.Option(help="Seconds the job may wait for its start before it fails.")
    ] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="Submitting again with the same key makes no second job.")
    ] = None,
    to: Annotated[list[str] | None, typer.Option("--to", metavar="URL", help=TO)] = None,
    reuse: Annotated[
        bool, typer.Option("--reuse", help="Take the result of an identical job, where one has succeeded.")
    ] = False,
) -> None:
    """Queue a job: a recipe on a model."""
    labels = parse_labels(label or [])
    chosen, gates = read_recipe(recipe), read_gates(gate or [])
    fields: dict[str, Any] = {"name": name, "priority": priority, "labels": labels, "reuse": reuse}
    fields |= {key: value for key, value in (("run_limit_s", run_limit), ("queue_limit_s", queue_limit)) if value}
    fields |= {"destinations": to} if to else {}
    with session.client() as client:
        subject = send_model(client, model, model_name, base=base, quiet=session.json)
        job = client.jobs.submit(subject, with_gates(client, chosen, gates), idempotency_key=idempotency_key, **fields)
        if not session.json:
            output.note(f"Submitted {job.id} to the queue {job.queue}: {output.clean(job.queue_reason)}")
        if not wait:
            output.print_json(job) if session.json else output.say(job.id)
            return
        _follow_to_end(client, job.id, json=session.json)


def watch(session: Session, job: JobArgument) -> None:
    """Show a job's progress until it ends. --json prints its events, one on each line. Ctrl-C detaches; the job goes on."""
    with session.client() as client:
        if not session.json:
            _follow_to_end(client, job, json=False)
        with detach_on_interrupt(job):
            for event in client.jobs.events(job):
                output.print_json(event)
            raise typer.Exit(exit_of(client.jobs.get(job)))


def wait(
    session: Session,
    job: JobArgument,
    timeout: Annotated[float | None, typer.Option(min=0, help="Seconds to wait at most; the job goes on.")] = None,
) -> None:
    """Wait for a job's end without showing progress. The exit status says how it ended. Ctrl-C detaches; the job goes on."""
    with session.client() as client:
        try:
            ended = follow(client, job, quiet=True, timeout_s=timeout)
        except TimeoutError as error:
            output.fail(str(error), f"`nightpress watch {job}` shows its progress.")
            raise typer.Exit(Exit.DETACHED) from None
        _end_with(ended, json=session.json)


def _follow_to_end(client: Client, job_id: str, *, json: bool) -> None:
    _end_with(follow(client, job_id, quiet=json), json=json)


def _end_with(job: JobView, *, json: bool) -> None:
    output.print_json(job) if json else print_end(job)
    raise typer.Exit(exit_of(job))


def ls(
    session: Session,
    state: Annotated[
        list[str] | None, typer.Option("--state", "-s", help="Only jobs in this state; may be repeated.")
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option("--label", "-l", metavar="K=V", help="Only jobs with this label; may be repeated."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Only jobs on this model, by id or name.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="How many, newest first.")] = 20,
) -> None:
    """List jobs, newest first."""
    with session.client() as client:
        found = []
        for job in client.jobs.iterate(states=state or (), labels=parse_labels(label or []), model=model):
            found.append(job)
            if len(found) == limit:
                break
    if session.json:
        for job in found:
            output.print_json(job)
        return
    rows = [
        (
            job.id,
            describe(job),
            f"{job.progress:.0%}" if job.state == "running" else "",
            job.model_name,
            job.recipe.get("name", ""),
            output.ago_text(job.created_at),
            job.name,
        )
        for job in found
    ]
    output.print_table(("job", "state", "", "model", "recipe", "submitted", "name"), rows, right=(2,))


def inspect(session: Session, job: JobArgument) -> None:
    """Print everything known about a job: its fields, artifacts and events."""
    with session.client() as client:
        view = client.jobs.get(job)
        history = list(client.jobs.past_events(job))
        artifacts = client.jobs.artifacts(job)
        trackers = trackers_of(client.jobs.trackers, job)
    if session.json:
        output.print_json({"job": view, "events": history, "artifacts": list(artifacts), "trackers": list(trackers)})
        return
    fields: list[tuple[str, object]] = [
        ("job", view.id),
        ("name", view.name),
        ("state", describe(view)),
        ("progress", f"{view.progress:.0%} {view.message}" if view.state == "running" else ""),
        ("model", f"{view.model_name} ({view.model_id})"),
        ("recipe", view.recipe.get("name")),
        ("queue", f"{view.queue}: {view.queue_reason}" if view.queue_reason else view.queue),
        ("notice", view.notice),
        ("priority", view.priority or None),
        ("labels", " ".join(f"{key}={value}" for key, value in view.labels.items())),
        ("delivered to", ", ".join(view.destinations)),
        ("attempts", f"{view.attempt}, {view.failures} failed of {view.max_failures} allowed"),
        ("cost", cost_text(view.cost)),
        ("worker", view.worker_id),
        ("retry of", view.retry_of),
        ("result of", view.reused_from),
        ("submitted", view.created_at),
        ("started", view.started_at),
        ("finished", view.finished_at),
    ]
    if view.error:
        fields.append(("error", f"{view.error.get('code')}: {view.error.get('message')} {view.error.get('hint', '')}"))
    fields += [
        (
            f"artifact {artifact.format}",
            f"{output.size_text(artifact.size)} in {len(artifact.files)} files, loaded by {artifact.consumer}",
        )
        for artifact in artifacts
    ]
    output.print_fields(fields + tracked_fields(trackers))
    for event in history:
        detail = " ".join(f"{key}={value}" for key, value in event.data.items() if not isinstance(value, dict | list))
        output.say(f"  {event.seq:>4}  {event.at:%Y-%m-%d %H:%M:%S}  {event.kind}  {output.clean(detail)}")


def logs(
    session: Session,
    job: JobArgument,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Print new lines until the job ends. Ctrl-C detaches.")
    ] = False,
) -> None:
    """Print a job's log."""
    with session.client() as client, detach_on_interrupt(job):
        for line in client.jobs.logs(job, follow=follow):
            output.print_json(line) if session.json else _print_line(line)


def _print_line(line: LogView) -> None:
    style = {"warning": "yellow", "error": "red", "debug": "dim"}.get(line.level, "")
    output.say(f"{line.at:%H:%M:%S} {line.level:<7} {output.clean(line.text)}", style)


def cancel(
    session: Session,
    job: Annotated[str | None, typer.Argument(metavar="[JOB]", help="The job's id.")] = None,
    label: Annotated[
        list[str] | None,
        typer.Option("--label", "-l", metavar="K=V", help="Every job with this label; may be repeated."),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Every job on this model.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every unfinished job.")] = False,
) -> None:
    """Cancel a job, or every job that matches. A queued job ends at once, a running job within seconds."""
    if [job is not None, bool(label or model), every].count(True) != 1:
        raise typer.BadParameter("Name one job, or say which with --label, --model or --all.", param_hint="JOB")
    if job is None:
        _cancel_all(session, JobFilter(labels=parse_labels(label or []), model=model, all=every))
        return
    with session.client() as client:
        view = client.jobs.cancel(job)
    if session.json:
        output.print_json(view)
    elif view.state in {"cancelled", "cancelling"}:
        output.say(f"{view.id} is {view.state}.")
    else:
        output.say(f"{view.id} had already ended: {describe(view)}.")


def _cancel_all(session: Session, wanted: JobFilter) -> None:
    """Repeat the request until no job is left: each cancels a limited number."""
    count, more = 0, True
    with session.client() as client:
        while more:
            done = client.jobs.cancel_all(wanted)
            count, more = count + done.cancelled, done.more and done.cancelled > 0
    if session.json:
        output.print_json({"cancelled": count})
    else:
        output.say(f"{count} job{'' if count == 1 else 's'} cancelled.")


def retry(
    session: Session,
    job: JobArgument,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Show progress until the new job ends.")] = False,
) -> None:
    """Queue a finished job again, as a new job."""
    with session.client() as client:
        view = client.jobs.retry(job)
        if wait:
            _follow_to_end(client, view.id, json=session.json)
        output.print_json(view) if session.json else output.say(view.id)


def trackers_of(ask: Callable[[str], list[TrackedView]], subject: str) -> list[TrackedView]:
    """The runs in trackers of a job or study that exists; none from a service of a version before trackers."""
    try:
        return ask(subject)
    except ApiError as error:
        if error.code != ErrorCode.NOT_FOUND:
            raise
        return []


def tracked_fields(trackers: Sequence[TrackedView]) -> list[tuple[str, object]]:
    """Where each tracker shows the run, or why it was not told of it."""
    shown = ((run.tracker, run.page or "not told yet", f" ({run.error})" if run.error else "") for run in trackers)
    return [(f"in {tracker}", f"{page}{error}") for tracker, page, error in shown]


def read_gates(gates: Sequence[str]) -> dict[str, str]:
    """Figure → bound. Raises BadParameter."""
    try:
        return dict(read_gate(text) for text in gates)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--gate") from error


def parse_labels(raw: list[str]) -> dict[str, str]:
    """Labels from `key=value` texts. Raises BadParameter for another form."""
    for label in raw:
        if not label.partition("=")[1]:
            raise typer.BadParameter(f"{label!r} is not of the form key=value.", param_hint="--label")
    return dict(label.split("=", 1) for label in raw)
