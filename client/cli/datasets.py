"""`nightpress datasets …`: list, show, add and remove data sets."""

from pathlib import Path
from typing import Annotated

import typer

from nightpress.client.cli import output
from nightpress.client.cli.registration import name_of_source, print_registered, progress_notes
from nightpress.client.cli.session import Session, takes_session

data_sets = typer.Typer(invoke_without_command=True, help="Data sets: list, show, add, remove.")


def add_to(app: typer.Typer) -> None:
    app.add_typer(data_sets, name="datasets", rich_help_panel="Service")


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
            data_set.id,
            data_set.name,
            data_set.state,
            "" if data_set.rows is None else f"{data_set.rows:,}",
            "yes" if data_set.labelled else "",
            output.size_text(data_set.size),
        )
        for data_set in found
    ]
    output.print_table(("data set", "name", "state", "rows", "labels", "size"), rows, right=(3, 5))


@data_sets.command("show")
@takes_session
def show_data_set(session: Session, data_set: Annotated[str, typer.Argument(metavar="DATASET")]) -> None:
    """Print everything known about a data set."""
    with session.client() as client:
        view = client.data_sets.get(data_set)
    if session.json:
        output.print_json(view)
        return
    output.print_fields(
        [
            ("data set", view.id),
            ("name", view.name),
            ("state", view.state),
            ("digest", view.digest),
            ("rows", view.rows),
            ("labels", "yes" if view.labelled else ""),
            ("size", output.size_text(view.size)),
            ("source", view.source),
            ("added", view.created_at),
            ("error", (view.error or {}).get("message")),
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
            help="A local file, or s3://bucket/file, hf://datasets/organisation/name@revision/file or …@revision?split=train&columns=text:NAME,label.",
        ),
    ],
    name: Annotated[str | None, typer.Option(help="The data set's name; otherwise the file's.")] = None,
) -> None:
    """Send a local data set, or have the server fetch one: prose, or rows with `text` and perhaps `label`, plain or .gz."""
    with session.client() as client:
        if "://" in file:
            data_set_id = client.data_sets.fetch(file, name or name_of_source(file)).id
        else:
            with output.transfer_meter(f"sending {file}", quiet=session.json) as meter:
                data_set_id = client.data_sets.upload(Path(file), name, meter=meter).id
        print_registered(session, client.data_sets.wait(data_set_id, on_update=progress_notes(session)))


@data_sets.command("rm")
@takes_session
def remove_data_set(session: Session, data_set: Annotated[str, typer.Argument(metavar="DATASET")]) -> None:
    """Remove a data set."""
    with session.client() as client:
        found = client.data_sets.get(data_set)
        client.data_sets.delete(found.id)
    output.print_json({"removed": found.id}) if session.json else output.say(f"{found.id} is gone.")
