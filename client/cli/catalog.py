"""Subcommands about what a service has: recipes, models, data sets, workers, queues."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer
import yaml

from nightpress.client.cli import output
from nightpress.client.cli.jobs import read_recipe, send_model
from nightpress.client.cli.session import Session, takes_session
from nightpress.client.errors import ClientError
from nightpress.client.folders import plain_name
from nightpress.core.recipes.plan import Plan
from nightpress.core.wire.models import DataSetView, ModelView

recipes = typer.Typer(invoke_without_command=True, help="The recipes: list, show one, check one's own, the schema.")
models = typer.Typer(
    invoke_without_command=True, help="The models: list, show, add, remove; history and promote: what a name means."
)
data_sets = typer.Typer(invoke_without_command=True, help="The data sets: list, show, add, remove.")


def add_to(app: typer.Typer) -> None:
    app.add_typer(recipes, name="recipes", rich_help_panel="Service")
    app.add_typer(models, name="models", rich_help_panel="Service")
    app.add_typer(data_sets, name="datasets", rich_help_panel="Service")
    app.command("workers", rich_help_panel="Service")(takes_session(workers))
    app.command("queues", rich_help_panel="Service")(takes_session(queues))


@recipes.callback()
@takes_session
def list_recipes(session: Session, context: typer.Context) -> None:
    if context.invoked_subcommand:
        return
    with session.client() as client:
        found = client.recipes.list()
    if session.json:
        output.print_json(found)
        return
    rows = [(one.name, ", ".join(one.passes), ", ".join(one.exports), one.description) for one in found]
    output.print_table(("recipe", "passes", "exports", ""), rows)


@recipes.command("show")
@takes_session
def show_recipe(session: Session, name: Annotated[str, typer.Argument(metavar="NAME")]) -> None:
    """Print a built-in recipe as YAML, to start one's own from."""
    with session.client() as client:
        found = client.recipes.get(name)
    if session.json:
        output.print_json(found)
    else:
        output.say(yaml.safe_dump(found.recipe, sort_keys=False, allow_unicode=False).rstrip())


@recipes.command("schema")
@takes_session
def recipe_schema(session: Session) -> None:
    """Print the JSON schema of a recipe, for an editor to check one against."""
    with session.client() as client:
        output.print_json(client.recipes.schema())


@recipes.command("validate")
@takes_session
def validate_recipe(
    session: Session,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or a built-in recipe's name.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The model it is meant for: gives an estimate.")
    ] = None,
) -> None:
    """Check a recipe, and say what it will do and take."""
    chosen = read_recipe(recipe)
    with session.client() as client:
        mapping = client.recipes.get(chosen).recipe if isinstance(chosen, str) else chosen
        plan = client.recipes.validate(mapping, model)
    if session.json:
        output.print_json(plan)
    else:
        print_plan(plan)


def print_plan(plan: Plan) -> None:
    output.say(f"{plan.recipe.name} is valid; its jobs go to the queue {plan.queue}: {plan.queue_reason}", "green")
    output.print_table(("", "step", ""), [(step.kind, step.name, step.detail) for step in plan.steps])
    if plan.estimate is not None:
        sizes = ", ".join(f"{name} {output.size_text(size)}" for name, size in plan.estimate.output_bytes.items())
        output.print_fields(
            [
                ("memory", output.size_text(plan.estimate.memory_bytes)),
                ("GPU memory", output.size_text(plan.estimate.gpu_bytes) if plan.estimate.gpu_bytes else None),
                ("disk", output.size_text(plan.estimate.disk_bytes)),
                ("time", f"about {output.duration_text(plan.estimate.seconds)} {_on(plan)}"),
                ("result", sizes),
            ]
        )
    for warning in plan.warnings:
        output.say(f"warning: {warning}", "yellow")


def _on(plan: Plan) -> str:
    assert plan.estimate is not None
    cores = "a core" if plan.estimate.threads == 1 else f"{plan.estimate.threads} cores"
    return f"on {cores} with a GPU" if plan.queue == "gpu" else f"on {cores}"


@models.callback()
@takes_session
def list_models(session: Session, context: typer.Context) -> None:
    if context.invoked_subcommand:
        return
    with session.client() as client:
        found = list(client.models.iterate())
    if session.json:
        output.print_json(found)
        return
    rows = [
        (
            one.id,
            one.name,
            one.state,
            one.architecture or "",
            f"{one.parameters / 1e6:,.1f} M" if one.parameters else "",
            output.size_text(one.size),
            output.ago_text(one.created_at),
        )
        for one in found
    ]
    output.print_table(("model", "name", "state", "architecture", "parameters", "size", "added"), rows, right=(4, 5))


@models.command("show")
@takes_session
def show_model(session: Session, model: Annotated[str, typer.Argument(metavar="MODEL")]) -> None:
    """Everything known of one model."""
    with session.client() as client:
        one = client.models.get(model)
    if session.json:
        output.print_json(one)
        return
    output.print_fields(
        [
            ("model", one.id),
            ("name", one.name),
            ("state", one.state),
            ("digest", one.digest),
            ("architecture", one.architecture),
            ("task", one.task),
            ("parameters", f"{one.parameters:,}" if one.parameters else None),
            ("source", one.source),
            ("added", one.created_at),
            ("error", (one.error or {}).get("message")),
        ]
    )
    output.print_table(
        ("file", "size", "SHA-256"), [(file.path, output.size_text(file.size), file.sha256) for file in one.files]
    )


@models.command("history")
@takes_session
def model_history(
    session: Session,
    model: Annotated[str, typer.Argument(metavar="MODEL")],
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="How many, newest first.")] = 20,
) -> None:
    """Which jobs' results a model's name has meant; the first is what `nightpress pull MODEL` fetches."""
    with session.client() as client:
        found = list(islice(client.models.promotions(model, limit=min(limit, 200)), limit))
    if session.json:
        output.print_json(found)
        return
    rows = [(f"{one.created_at:%Y-%m-%d %H:%M}Z", one.job_id, one.recipe, one.cause) for one in found]
    output.print_table(("since", "job", "recipe", "because"), rows)


@models.command("promote")
@takes_session
def promote_job(
    session: Session,
    model: Annotated[str, typer.Argument(metavar="MODEL")],
    job: Annotated[str, typer.Argument(metavar="JOB", help="A job of this model whose result was accepted.")],
) -> None:
    """Let a model's name mean another job's result, e.g. to go back. Holds until the next one is accepted."""
    with session.client() as client:
        made = client.models.promote(model, job)
    if session.json:
        output.print_json(made)
    else:
        output.say(f"{made.model_name} is now {made.job_id} ({made.recipe}).")


@models.command("add")
@takes_session
def add_model(
    session: Session,
    folder: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER|SOURCE", help="A local folder, or s3://bucket/folder or hf://organisation/name@revision."
        ),
    ],
    name: Annotated[str | None, typer.Option(help="Otherwise the folder's.")] = None,
) -> None:
    """Send a local model folder (or use it in place, where the server may read it), or have the server fetch one."""
    with session.client() as client:
        if "://" in folder:
            started = client.models.fetch(folder, name or _name_in(folder)).id
        else:
            started = send_model(client, folder, name, quiet=session.json)
        _print_brought(session, client.models.wait(started, on_update=_brought(session)))


@models.command("rm")
@takes_session
def remove_model(session: Session, model: Annotated[str, typer.Argument(metavar="MODEL")]) -> None:
    """Remove a model. Jobs done with it keep their results."""
    with session.client() as client:
        found = client.models.get(model)
        client.models.delete(found.id)
    output.print_json({"removed": found.id}) if session.json else output.say(f"{found.id} is gone.")


@data_sets.callback()
@takes_session
def list_data_sets(session: Session, context: typer.Context) -> None:
    if context.invoked_subcommand:
        return
    with session.client() as client:
        found = list(client.data_sets.iterate())
    if session.json:
        output.print_json(found)
        return
    rows = [
        (
            one.id,
            one.name,
            one.state,
            "" if one.rows is None else f"{one.rows:,}",
            "yes" if one.labelled else "",
            output.size_text(one.size),
        )
        for one in found
    ]
    output.print_table(("data set", "name", "state", "rows", "labels", "size"), rows, right=(3, 5))


@data_sets.command("show")
@takes_session
def show_data_set(session: Session, data_set: Annotated[str, typer.Argument(metavar="DATASET")]) -> None:
    """Everything known of one data set."""
    with session.client() as client:
        one = client.data_sets.get(data_set)
    if session.json:
        output.print_json(one)
        return
    output.print_fields(
        [
            ("data set", one.id),
            ("name", one.name),
            ("state", one.state),
            ("digest", one.digest),
            ("rows", one.rows),
            ("labels", "yes" if one.labelled else ""),
            ("size", output.size_text(one.size)),
            ("source", one.source),
            ("added", one.created_at),
            ("error", (one.error or {}).get("message")),
        ]
    )


@data_sets.command("add")
@takes_session
def add_data_set(
    session: Session,
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE|SOURCE",
            help="A local file, or s3://bucket/file or hf://datasets/organisation/name@revision/file.",
        ),
    ],
    name: Annotated[str | None, typer.Option(help="Otherwise the file's.")] = None,
) -> None:
    """Send a local data set (prose, or rows with `text` and perhaps `label`, plain or .gz), or have the server fetch one."""
    with session.client() as client:
        if "://" in file:
            started = client.data_sets.fetch(file, name or _name_in(file)).id
        else:
            with output.transfer_meter(f"sending {file}", quiet=session.json) as meter:
                started = client.data_sets.upload(Path(file), name, meter=meter).id
        _print_brought(session, client.data_sets.wait(started, on_update=_brought(session)))


@data_sets.command("rm")
@takes_session
def remove_data_set(session: Session, data_set: Annotated[str, typer.Argument(metavar="DATASET")]) -> None:
    """Remove a data set."""
    with session.client() as client:
        found = client.data_sets.get(data_set)
        client.data_sets.delete(found.id)
    output.print_json({"removed": found.id}) if session.json else output.say(f"{found.id} is gone.")


def workers(session: Session) -> None:
    """The workers, and what each does."""
    with session.client() as client:
        found = client.workers()
    if session.json:
        output.print_json(found)
        return
    rows = [
        (
            one.id,
            one.host,
            one.queue,
            one.state,
            one.device,
            output.size_text(one.memory),
            one.threads,
            one.unfit or one.job_id or "",
            output.ago_text(one.last_seen_at),
        )
        for one in found
    ]
    output.print_table(
        ("worker", "host", "queue", "state", "device", "memory", "threads", "job, or what is wrong", "seen"),
        rows,
        right=(5, 6),
    )


def queues(session: Session) -> None:
    """What waits and what runs, over all tenants."""
    with session.client() as client:
        found = client.queues()
    if session.json:
        output.print_json(found)
        return
    rows = [
        (one.name, one.queued, one.running, output.duration_text(one.oldest_queued_s or 0) if one.queued else "")
        for one in found
    ]
    output.print_table(("queue", "queued", "running", "oldest waits"), rows, right=(1, 2, 3))


def _name_in(source: str) -> str:
    """The last word of an address that is no revision, without its endings."""
    return plain_name(source.rstrip("/").rpartition("/")[2].partition("@")[0].partition(".")[0])


def _brought(session: Session) -> Callable[[ModelView | DataSetView], None]:
    """Say each new tenth of what the server fetches or verifies."""
    said = [-1]

    def say(one: ModelView | DataSetView) -> None:
        tenth = int((one.progress or 0) * 10)
        if one.state in {"fetching", "verifying"} and tenth > said[0] and not session.json:
            said[0] = tenth
            output.note(f"{one.state} {tenth * 10}%", "dim")

    return say


def _print_brought(session: Session, one: ModelView | DataSetView) -> None:
    if one.state == "failed":
        error = one.error or {}
        raise ClientError(f"{one.name}: {error.get('message', 'it failed')}", hint=str(error.get("hint", "")))
    output.print_json(one) if session.json else output.say(f"{one.id}  {output.clean(one.name)}  {one.state}")
