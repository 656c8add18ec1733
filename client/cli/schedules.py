"""`nightpress schedule …`: jobs that are submitted again and again."""

from pathlib import Path
from typing import Annotated, Any

import typer

from nightpress.client.cli import output
from nightpress.client.cli.cost import cost_text
from nightpress.client.cli.deliveries import TO
from nightpress.client.cli.jobs import parse_labels
from nightpress.client.cli.recipes import read_recipe
from nightpress.client.cli.session import Session, takes_session
from nightpress.client.cli.studies import read_study
from nightpress.core.wire.schedules import ScheduleRunView, ScheduleView

schedules = typer.Typer(invoke_without_command=True, help="Schedules: list, add, show, edit, suspend, resume, trigger.")

Named = Annotated[str, typer.Argument(metavar="SCHEDULE", help="Its name or id.")]
Cron = Annotated[str, typer.Option("--cron", "-c", help="Five fields, e.g. '0 2 * * *' for two at night.")]
Zone = Annotated[str, typer.Option("--timezone", "-z", help="An IANA time zone, e.g. Europe/Berlin.")]
OVERLAP = "What to do while the last run still goes on: skip, queue or replace."
CATCH_UP = "Which fires to make up for after the service was down: none, latest or all."


def add_to(app: typer.Typer) -> None:
    app.add_typer(schedules, name="schedule", rich_help_panel="Jobs")


@schedules.callback()
@takes_session
def list_schedules(session: Session, context: typer.Context) -> None:
    if context.invoked_subcommand:
        return
    with session.client() as client:
        found = list(client.schedules.iterate())
    if session.json:
        output.print_json(found)
        return
    rows = [
        (
            schedule.name,
            schedule.cron,
            schedule.timezone,
            "suspended"
            if schedule.suspended
            else f"{schedule.upcoming[0]:%Y-%m-%d %H:%M}Z"
            if schedule.upcoming
            else "never",
            schedule.job.model,
            _recipe_name(schedule),
            schedule.overlap,
        )
        for schedule in found
    ]
    output.print_table(("schedule", "cron", "time zone", "next", "model", "recipe", "overlap"), rows)


@schedules.command("add")
@takes_session
def add(
    session: Session,
    name: Annotated[str, typer.Argument(metavar="NAME")],
    cron: Cron,
    model: Annotated[
        str, typer.Option("--model", "-m", help="A model's name: each fire takes its newest ready model.")
    ],
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="A built-in recipe's name, or a YAML file.")
    ] = None,
    study: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A YAML file with the fields of a study (minimize, gates, trials, …), in place of a recipe: each fire begins one.",
        ),
    ] = None,
    timezone: Zone = "UTC",
    source: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Where each fire first looks for a newer model: s3://…, hf://…, or a folder of the server.",
        ),
    ] = None,
    overlap: Annotated[str, typer.Option(help=OVERLAP)] = "skip",
    catch_up: Annotated[str, typer.Option(help=CATCH_UP)] = "latest",
    only_if_changed: Annotated[
        bool,
        typer.Option(
            "--only-if-changed",
            help="Skip a fire where model, recipe, data and engine are the same as at the last run.",
        ),
    ] = False,
    priority: Annotated[int, typer.Option(min=-100, max=100, help="Higher goes first.")] = 0,
    label: Annotated[
        list[str] | None, typer.Option("--label", "-l", metavar="K=V", help="A label for each job; may be repeated.")
    ] = None,
    to: Annotated[list[str] | None, typer.Option("--to", metavar="URL", help=TO)] = None,
    no_promote: Annotated[
        bool, typer.Option("--no-promote", help="Don't let accepted results become the model's latest.")
    ] = False,
) -> None:
    """Make a schedule that submits a job, or begins a study, again and again, e.g. every night."""
    if (recipe is None) == (study is None):
        raise typer.BadParameter("give a recipe or a study, and not both", param_hint="--recipe / --study")
    fields: dict[str, Any] = {"overlap": overlap, "catch_up": catch_up, "only_if_changed": only_if_changed}
    fields |= {"source": source} if source else {}
    fields |= {"priority": priority, "labels": parse_labels(label or []), "promote": not no_promote}
    if to and study:
        raise typer.BadParameter(
            "a study's winner goes where its model's results go: `nightpress deliveries of-model`", param_hint="--to"
        )
    fields |= {"destinations": to} if to else {}
    with session.client() as client:
        chosen = None if recipe is None else read_recipe(recipe)
        wanted = None if study is None else read_study(study)
        made = client.schedules.create(name, cron, model, chosen, study=wanted, timezone=timezone, **fields)
    _print(session, made)


@schedules.command("show")
@takes_session
def show(session: Session, name: Named, limit: Annotated[int, typer.Option("--limit", "-n", min=1)] = 10) -> None:
    """Print a schedule, its next fires, and the outcomes of its last fires."""
    with session.client() as client:
        found = client.schedules.get(name)
        runs = [run for run, _ in zip(client.schedules.runs(name), range(limit), strict=False)]
    if session.json:
        output.print_json({"schedule": found, "runs": runs})
        return
    _print(session, found)
    if runs:
        output.print_table(("fire", "cause", "outcome", "job or study"), [_row(run) for run in runs])


@schedules.command("edit")
@takes_session
def edit(
    session: Session,
    name: Named,
    cron: Annotated[str | None, typer.Option("--cron", "-c")] = None,
    timezone: Annotated[str | None, typer.Option("--timezone", "-z")] = None,
    overlap: Annotated[str | None, typer.Option(help=OVERLAP)] = None,
    catch_up: Annotated[str | None, typer.Option(help=CATCH_UP)] = None,
    only_if_changed: Annotated[bool | None, typer.Option("--only-if-changed/--always")] = None,
    recipe: Annotated[str | None, typer.Option("--recipe", "-r", help="Another recipe.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Another model.")] = None,
    source: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE", help="Another place where each fire first looks for a newer model; '' for none."
        ),
    ] = None,
    to: Annotated[list[str] | None, typer.Option("--to", metavar="URL", help=f"{TO} '' for none.")] = None,
) -> None:
    """Change the given options of a schedule. Options that are not given stay as they are."""
    given = {
        "cron": cron,
        "timezone": timezone,
        "overlap": overlap,
        "catch_up": catch_up,
        "only_if_changed": only_if_changed,
    }
    changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if source is not None:
        changes["source"] = source or None
    with session.client() as client:
        found = client.schedules.get(name)
        job = {
            "model": model,
            "recipe": read_recipe(recipe) if recipe else None,
            "destinations": None if to is None else [url for url in to if url],
        }
        if any(value is not None for value in job.values()):
            changes["job"] = found.job.model_copy(
                update={key: value for key, value in job.items() if value is not None}
            )
        _print(session, client.schedules.edit(name, version=found.version, **changes))


@schedules.command("suspend")
@takes_session
def suspend(session: Session, name: Named) -> None:
    """Submit no more jobs until the schedule is resumed."""
    with session.client() as client:
        _print(session, client.schedules.suspend(name))


@schedules.command("resume")
@takes_session
def resume(session: Session, name: Named) -> None:
    """Submit jobs again, from the next due time on."""
    with session.client() as client:
        _print(session, client.schedules.resume(name))


@schedules.command("trigger")
@takes_session
def trigger(session: Session, name: Named) -> None:
    """Submit the job now."""
    with session.client() as client:
        run = client.schedules.trigger(name)
    if session.json:
        output.print_json(run)
    else:
        output.say(f"{run.id}: its job appears within seconds. `nightpress schedule show {name}` lists it.")


@schedules.command("rm")
@takes_session
def remove(session: Session, name: Named) -> None:
    """Delete a schedule. Its jobs stay."""
    with session.client() as client:
        client.schedules.delete(name)
    output.print_json({"removed": name}) if session.json else output.say(f"{name} is gone.")


def _print(session: Session, schedule: ScheduleView) -> None:
    if session.json:
        output.print_json(schedule)
        return
    output.print_fields(
        [
            ("schedule", schedule.name),
            ("cron", f"{schedule.cron} {schedule.timezone}"),
            ("state", "suspended" if schedule.suspended else "active"),
            ("study" if schedule.study else "job", f"{_recipe_name(schedule)} on {schedule.job.model}"),
            ("source", schedule.source),
            ("delivered to", ", ".join(schedule.job.destinations)),
            ("overlap", schedule.overlap),
            ("catch up", schedule.catch_up),
            ("only if changed", "yes" if schedule.only_if_changed else ""),
            ("cost", cost_text(schedule.cost)),
            ("next", ", ".join(f"{moment:%Y-%m-%d %H:%M}Z" for moment in schedule.upcoming[:3])),
        ]
    )


def _recipe_name(schedule: ScheduleView) -> str:
    if schedule.study is not None:
        return f"least {schedule.study.minimize}"
    return schedule.job.recipe if isinstance(schedule.job.recipe, str) else str(schedule.job.recipe.get("name", ""))


def _row(run: ScheduleRunView) -> tuple[str, ...]:
    outcome: str = run.job_state or run.study_state or run.state
    if run.reason or run.error:
        outcome += f": {run.reason or (run.error or {}).get('message')}"
    ended = run.job_verdict or run.study_verdict
    verdict = f" ({ended})" if ended else ""
    return f"{run.scheduled_for:%Y-%m-%d %H:%M}Z", run.cause, outcome + verdict, run.job_id or run.study_id or ""
