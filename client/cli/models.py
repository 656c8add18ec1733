"""`nightpress models …`: list, show, add and remove models, and what a model's name means. Also how every command sends one."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from nightpress.client.cli import output
from nightpress.client.cli.registration import left_out_text, name_of_source, print_registered, progress_notes
from nightpress.client.cli.session import Session, takes_session
from nightpress.client.client import Client
from nightpress.client.errors import ApiError
from nightpress.client.folders import read_adapter_folder, read_model_folder, read_sent_folder
from nightpress.core.errors import ErrorCode
from nightpress.core.recipes.possible import Possibility
from nightpress.core.wire.models import ModelView

models = typer.Typer(
    invoke_without_command=True, help="Models: list, show, add, remove; history and promote: which result a name means."
)


def add_to(app: typer.Typer) -> None:
    app.add_typer(models, name="models", rich_help_panel="Service")


BASE = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="The folder is an adapter (LoRA): the model that it was trained for, as id, name, address or local folder. Otherwise its config says which.",
    ),
]


def send_model(client: Client, model: str, name: str | None, *, base: str | None = None, quiet: bool) -> str:
    """The id or name to submit. A local folder is registered in place where the server allows it, and sent otherwise.

    base: of an adapter, its base, which is sent first if it is a local folder. Returns when the server has verified both. Raises BadParameter where there is no such folder, NightpressError for a folder that is no model, and ClientError.
    """
    folder = Path(model)
    if not folder.is_dir():
        if "/" in model or model.startswith("."):
            raise typer.BadParameter(f"There is no folder {model}.", param_hint="MODEL")
        if base is not None:
            raise typer.BadParameter("Only for a local folder of an adapter.", param_hint="--base")
        return model
    chosen = read_sent_folder(folder, name)
    if base is not None and Path(base).is_dir():
        read_adapter_folder(folder, read_model_folder(Path(base)))  # before anything is sent
        base = send_model(client, base, None, quiet=quiet)
    if (registered := _register_in_place(client, folder.resolve(), chosen.name, base)) is not None:
        return registered.id
    if chosen.left_out and not quiet:
        output.note(left_out_text(chosen.left_out), "dim")
    with output.transfer_meter(f"sending {output.clean(chosen.name)}", quiet=quiet) as meter:
        return client.models.upload(chosen, base=base, meter=meter).id


def _register_in_place(client: Client, folder: Path, name: str, base: str | None) -> ModelView | None:
    """Register the folder without a copy. None where the server is another machine, or its operator has not allowed the folder."""
    if client.http.base_url.host not in {"127.0.0.1", "localhost", "::1"}:
        return None
    try:
        return client.models.register(str(folder), name, base=base)
    except ApiError as error:
        if error.code in {ErrorCode.PATH_NOT_ALLOWED, ErrorCode.NOT_FOUND, ErrorCode.UNSUPPORTED_FORMAT}:
            return None
        raise


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
            model.id,
            model.name,
            model.state,
            model.architecture or "",
            f"{model.parameters / 1e6:,.1f} M" if model.parameters else "",
            output.size_text(model.size),
            output.ago_text(model.created_at),
        )
        for model in found
    ]
    output.print_table(("model", "name", "state", "architecture", "parameters", "size", "added"), rows, right=(4, 5))


@models.command("show")
@takes_session
def show_model(session: Session, model: Annotated[str, typer.Argument(metavar="MODEL")]) -> None:
    """Print everything known about a model, and which passes and exports it can have."""
    with session.client() as client:
        view = client.models.get(model)
        possible = client.models.possible(model) if view.state == "ready" else []
    if session.json:
        output.print_json(view)
        return
    output.print_fields(
        [
            ("model", view.id),
            ("name", view.name),
            ("state", view.state),
            ("digest", view.digest),
            ("architecture", view.architecture),
            ("task", view.task),
            ("parameters", f"{view.parameters:,}" if view.parameters else None),
            ("adapter of", view.base_id),
            ("source", view.source),
            ("left out", ", ".join(view.left_out) or None),
            ("added", view.created_at),
            ("error", (view.error or {}).get("message")),
        ]
    )
    output.print_table(
        ("file", "size", "SHA-256"), [(file.path, output.size_text(file.size), file.sha256) for file in view.files]
    )
    print_possible(possible)


def print_possible(possible: Sequence[Possibility]) -> None:
    """Print which passes and exports a model can have, and why not the others."""
    if not possible:
        return
    for kind, title in (("pass", "passes"), ("export", "exports")):
        names = [found.name for found in possible if found.kind == kind and found.why_not is None]
        output.say(f"{title}: {', '.join(names) or 'none'}")
    refused = [found for found in possible if found.why_not is not None]
    if refused:
        output.print_table(("not possible", "because"), [(found.name, found.why_not) for found in refused])


@models.command("history")
@takes_session
def model_history(
    session: Session,
    model: Annotated[str, typer.Argument(metavar="MODEL")],
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="How many, newest first.")] = 20,
    atom: Annotated[bool, typer.Option("--atom", help="Print the Atom feed of the last fifty instead.")] = False,
) -> None:
    """List the jobs whose results a model's name has meant. `nightpress pull MODEL` fetches the first."""
    with session.client() as client:
        if atom:
            output.say(client.models.feed(model))
            return
        found = list(islice(client.models.promotions(model, limit=min(limit, 200)), limit))
    if session.json:
        output.print_json(found)
        return
    rows = [
        (f"{promotion.created_at:%Y-%m-%d %H:%M}Z", promotion.job_id, promotion.recipe, promotion.cause)
        for promotion in found
    ]
    output.print_table(("since", "job", "recipe", "because"), rows)


@models.command("promote")
@takes_session
def promote_job(
    session: Session,
    model: Annotated[str, typer.Argument(metavar="MODEL")],
    job: Annotated[str, typer.Argument(metavar="JOB", help="A job of this model whose result was accepted.")],
) -> None:
    """Let a model's name mean another job's result, e.g. to go back. The next accepted result replaces it."""
    with session.client() as client:
        promotion = client.models.promote(model, job)
    if session.json:
        output.print_json(promotion)
    else:
        output.say(f"{promotion.model_name} is now {promotion.job_id} ({promotion.recipe}).")


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
    name: Annotated[str | None, typer.Option(help="The model's name; otherwise the folder's.")] = None,
    base: BASE = None,
) -> None:
    """Send a local model folder, or have the server fetch a model. A folder that the server may read is used in place.

    An adapter (LoRA) is merged into its base by each job that reads it. Many adapters share one base.
    """
    with session.client() as client:
        if "://" in folder:
            model_id = client.models.fetch(folder, name or name_of_source(folder), base=base).id
        else:
            model_id = send_model(client, folder, name, base=base, quiet=session.json)
        print_registered(session, client.models.wait(model_id, on_update=progress_notes(session)))


@models.command("rm")
@takes_session
def remove_model(session: Session, model: Annotated[str, typer.Argument(metavar="MODEL")]) -> None:
    """Remove a model. Jobs done with it keep their results."""
    with session.client() as client:
        found = client.models.get(model)
        client.models.delete(found.id)
    output.print_json({"removed": found.id}) if session.json else output.say(f"{found.id} is gone.")
