"""`nightpress search` and `nightpress studies …`: find the best form of a model that keeps some gates."""

from pathlib import Path
from typing import Annotated, Any

import typer

from nightpress.client.cli import output
from nightpress.client.cli.exits import Exit
from nightpress.client.cli.jobs import parse_labels, read_gates, tracked_fields, trackers_of
from nightpress.client.cli.models import send_model
from nightpress.client.cli.session import Session, takes_session
from nightpress.client.cli.study_output import StudyProgress, print_report, print_study, print_trials
from nightpress.client.client import Client
from nightpress.client.errors import ClientError
from nightpress.core.recipes.yamlfile import read_yaml
from nightpress.core.wire.jobs import TERMINAL_STATES
from nightpress.core.wire.studies import StudyView

studies = typer.Typer(invoke_without_command=True, help="Studies: list, show, trials, events, cancel.")
StudyArgument = Annotated[str, typer.Argument(metavar="STUDY", help="The study's id.")]


def add_to(app: typer.Typer) -> None:
    app.command("search", rich_help_panel="Jobs")(takes_session(search))
    app.add_typer(studies, name="studies", rich_help_panel="Jobs")


def search(
    session: Session,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model's id or name, or a local folder, which is sent first.")
    ],
    gate: Annotated[
        list[str],
        typer.Option("--gate", "-g", metavar="GATE", help="A bound such as 'perplexity <= +1%'; may be repeated."),
    ],
    minimize: Annotated[str, typer.Option("--minimize", "-m", help="size, latency, decode or memory.")] = "size",
    target: Annotated[
        str | None, typer.Option(help="Where the result is to run: cpu-encoder, cpu-llm, gpu-vllm or browser.")
    ] = None,
    space: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A YAML file with recipes in which values are choices or ranges."),
    ] = None,
    data: Annotated[str | None, typer.Option(help="The data set that quality is measured on.")] = None,
    samples: Annotated[int | None, typer.Option(min=2, help="Samples of that data for each measurement.")] = None,
    length: Annotated[int | None, typer.Option(min=8, help="Tokens of each sample.")] = None,
    trials: Annotated[int, typer.Option("--trials", "-n", min=1, help="Recipes to try at most.")] = 40,
    parallel: Annotated[
        int | None, typer.Option("--parallel", "-p", min=1, help="Trials at the same time; otherwise one a worker.")
    ] = None,
    hours: Annotated[float, typer.Option(min=0, help="Hours after which the search ends.")] = 24.0,
    cpu_hours: Annotated[float | None, typer.Option(min=0, help="Hours of CPU workers that it may take.")] = None,
    gpu_hours: Annotated[float | None, typer.Option(min=0, help="Hours of GPU workers that it may take.")] = None,
    max_cost: Annotated[float | None, typer.Option(min=0, help="What it may cost, in the operator's currency.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed and results give the same trials.")] = 0,
    start_from: Annotated[
        str | None, typer.Option(metavar="STUDY", help="Try the best recipes of this study of the same space first.")
    ] = None,
    name: Annotated[str, typer.Option(help="A title for the study.")] = "",
    priority: Annotated[int, typer.Option(min=-100, max=100, help="Higher goes first.")] = 0,
    label: Annotated[
        list[str] | None, typer.Option("--label", "-l", metavar="K=V", help="A label for each job; may be repeated.")
    ] = None,
    no_screen: Annotated[
        bool, typer.Option("--no-screen", help="Measure every trial whole, also where few texts show that it misses.")
    ] = False,
    no_promote: Annotated[
        bool, typer.Option("--no-promote", help="Don't let the winner become the model's latest.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Show progress until the study ends.")] = False,
) -> None:
    """Find the smallest or fastest form of a model that keeps your gates, by trying many recipes on all workers."""
    fields: dict[str, Any] = {
        "trials": trials,
        "hours": hours,
        "seed": seed,
        "name": name,
        "priority": priority,
        "labels": parse_labels(label or []),
        "screen": not no_screen,
        "promote": not no_promote,
    }
    given = {
        "target": target,
        "parallel": parallel,
        "cpu_hours": cpu_hours,
        "gpu_hours": gpu_hours,
        "max_cost": max_cost,
        "start_from": start_from,
        "data": data,
        "samples": samples,
        "length": length,
    }
    fields |= {key: value for key, value in given.items() if value is not None}
    if space is not None:
        fields |= _read_space(space)
    gates = read_gates(gate)
    with session.client() as client:
        subject = send_model(client, model, None, quiet=session.json)
        study = client.studies.create(subject, gates, minimize=minimize, **fields)
        if not session.json:
            output.note(f"Began {study.id}: up to {study.trials} trials, {study.parallel} at a time.")
        if not wait:
            output.print_json(study) if session.json else output.say(study.id)
            return
        _follow(session, client, study.id)


@studies.callback()
@takes_session
def list_studies(session: Session, context: typer.Context) -> None:
    if context.invoked_subcommand:
        return
    _list(session)


@studies.command("list")
@takes_session
def list_all(session: Session) -> None:
    """List studies, newest first."""
    _list(session)


def _list(session: Session) -> None:
    with session.client() as client:
        found = list(client.studies.iterate())
    if session.json:
        output.print_json(found)
        return
    rows = [
        (
            study.id,
            study.model_name,
            study.minimize,
            ", ".join(f"{figure} {bound}" for figure, bound in study.gates.items()),
            study.verdict or study.state,
            f"{sum(study.counts.values())}/{study.trials}",
            "" if study.best is None else f"{100 * study.best.goal:.1f}%",
            output.ago_text(study.created_at),
        )
        for study in found
    ]
    output.print_table(("study", "model", "minimize", "gates", "state", "trials", "best", "begun"), rows, right=(5, 6))


@studies.command("show")
@takes_session
def show(session: Session, study: StudyArgument) -> None:
    """Print a study and, once it has succeeded, its report: the winner, the front, and what mattered."""
    with session.client() as client:
        found = client.studies.get(study)
        report = client.studies.report(study) if found.state == "succeeded" else None
        trackers = trackers_of(client.studies.trackers, study)
    if session.json:
        output.print_json({"study": found, "report": report, "trackers": list(trackers)})
        return
    print_study(found)
    if trackers:
        output.print_fields(tracked_fields(trackers))
    if report is not None:
        print_report(found, report)


@studies.command("trials")
@takes_session
def trials(session: Session, study: StudyArgument) -> None:
    """List all trials of a study, with what each chose and why each ended."""
    with session.client() as client:
        found = list(client.studies.trials(study))
    if session.json:
        for trial in found:
            output.print_json(trial)
        return
    print_trials(found)


@studies.command("watch")
@takes_session
def watch(session: Session, study: StudyArgument) -> None:
    """Show a study's progress until it ends. Ctrl-C detaches; the study goes on."""
    with session.client() as client:
        _follow(session, client, study)


@studies.command("events")
@takes_session
def events(
    session: Session,
    study: StudyArgument,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Also print what comes, until the study ends.")
    ] = False,
) -> None:
    """Print a study's events: trials that began and ended, and what was decided."""
    with session.client() as client:
        for event in client.studies.events(study) if follow else client.studies.past_events(study):
            if session.json:
                output.print_json(event)
            else:
                told = ", ".join(f"{key} {value}" for key, value in event.data.items() if value is not None)
                output.say(f"{event.at:%Y-%m-%d %H:%M:%S}Z  {event.kind}  {output.clean(told)}")


@studies.command("cancel")
@takes_session
def cancel(session: Session, study: StudyArgument) -> None:
    """Cancel a study and its trials."""
    with session.client() as client:
        found = client.studies.cancel(study)
    output.print_json(found) if session.json else output.say(f"{found.id}  {found.state}")


def _follow(session: Session, client: Client, study_id: str) -> None:
    """Wait for a study's end, print its report, and end with its exit status. Ctrl-C detaches."""
    try:
        progress = None if session.json else StudyProgress()
        ended = client.studies.wait(study_id, on_update=progress)
    except KeyboardInterrupt:
        output.note(
            f"\nDetached. Study {study_id} goes on: `nightpress studies watch {study_id}` shows it again, "
            f"`nightpress studies cancel {study_id}` stops it."
        )
        raise typer.Exit(Exit.DETACHED) from None
    report = client.studies.report(study_id) if ended.state == "succeeded" else None
    if session.json:
        output.print_json({"study": ended, "report": report})
    else:
        print_study(ended)
        if report is not None:
            print_report(ended, report)
    raise typer.Exit(_exit_of(ended))


def _exit_of(study: StudyView) -> Exit:
    assert study.state in TERMINAL_STATES
    if study.state != "succeeded":
        return Exit.JOB_FAILED
    return Exit.REJECTED if study.verdict == "rejected" else Exit.OK


def read_study(file: Path) -> dict[str, Any]:
    """The fields of a study from a YAML file, for a schedule."""
    read = _read_yaml(file)
    if not isinstance(read, dict):
        raise ClientError(f"{file} is no mapping of a study's fields.", hint="docs/how-to/search.md has an example.")
    return {str(key): value for key, value in read.items()}


def _read_yaml(file: Path) -> Any:
    try:
        return read_yaml(file.read_text())
    except OSError as error:
        raise ClientError(f"{file} can't be read: {error.strerror}.", hint="Name a YAML file.") from error


def _read_space(file: Path) -> dict[str, Any]:
    """The fields of a space file: a list of recipes, or a mapping with `recipes`, `evaluate` and `calibration`."""
    read = _read_yaml(file)
    if isinstance(read, list):
        return {"space": read}
    known = {"recipes", "evaluate", "calibration"}
    if not isinstance(read, dict) or "recipes" not in read or set(read) - known:
        raise ClientError(
            f"{file} is no space: it is a list of recipes, or has `recipes` and, if wanted, `evaluate` and `calibration`.",
            hint="docs/how-to/search.md has an example.",
        )
    return {("space" if key == "recipes" else key): value for key, value in read.items()}
