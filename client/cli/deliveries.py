"""`nightpress deliveries …`: results on their way to buckets, the Hub and registries."""

from itertools import islice
from typing import Annotated

import typer

from nightpress.client.cli import output
from nightpress.client.cli.session import Session, takes_session
from nightpress.core.wire.deliveries import ResultDeliveryView

deliveries = typer.Typer(
    invoke_without_command=True,
    help="Deliveries of results: list, add, show, cancel, retry, and the standing destinations of a model.",
)

Delivery = Annotated[str, typer.Argument(metavar="DELIVERY", help="Its id.")]
TO = "Deliver an accepted result there: s3://bucket/folder, hf://organisation/name@branch or oci://registry/name:tag, with {model}, {job} and {artifact}; may be repeated."


def add_to(app: typer.Typer) -> None:
    app.add_typer(deliveries, name="deliveries", rich_help_panel="Results")


@deliveries.callback()
@takes_session
def list_deliveries(
    session: Session,
    context: typer.Context,
    job: Annotated[str | None, typer.Option(help="Only of this job.")] = None,
    state: Annotated[
        str | None, typer.Option("--state", "-s", help="Only pending, delivered, failed, cancelled or superseded ones.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="How many, newest first.")] = 20,
) -> None:
    if context.invoked_subcommand:
        return
    with session.client() as client:
        found = list(islice(client.deliveries.iterate(job_id=job, state=state, limit=min(limit, 200)), limit))
    if session.json:
        output.print_json(found)
        return
    rows = [
        (delivery.id, _state(delivery), delivery.artifact, delivery.destination, output.ago_text(delivery.created_at))
        for delivery in found
    ]
    output.print_table(("delivery", "state", "artifact", "destination", "made"), rows)


@deliveries.command("add")
@takes_session
def add(
    session: Session,
    job: Annotated[str, typer.Argument(metavar="JOB", help="A job whose result was accepted.")],
    destinations: Annotated[
        list[str],
        typer.Argument(metavar="URL...", help="s3://…, hf://… or oci://… addresses that the operator allows."),
    ],
) -> None:
    """Deliver every artifact of a job now."""
    with session.client() as client:
        made = client.deliveries.create(job, destinations)
    if session.json:
        output.print_json(made)
        return
    for delivery in made:
        output.say(f"{delivery.id}: {delivery.artifact} to {delivery.destination}")
    if not made:
        output.note("All of it is on its way already: `nightpress deliveries`.")


@deliveries.command("show")
@takes_session
def show(session: Session, delivery: Delivery) -> None:
    """Print a delivery and every try."""
    with session.client() as client:
        _print(session, client.deliveries.get(delivery))


@deliveries.command("cancel")
@takes_session
def cancel(session: Session, delivery: Delivery) -> None:
    """Cancel a delivery. One that is under way ends within seconds."""
    with session.client() as client:
        _print(session, client.deliveries.cancel(delivery))


@deliveries.command("retry")
@takes_session
def retry(session: Session, delivery: Delivery) -> None:
    """Try a failed or cancelled delivery again, or a pending one now. It goes on where it stopped."""
    with session.client() as client:
        _print(session, client.deliveries.retry(delivery))


@deliveries.command("of-model")
@takes_session
def of_model(
    session: Session,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model's name.")],
    to: Annotated[list[str] | None, typer.Option("--to", metavar="URL", help=TO)] = None,
    none: Annotated[bool, typer.Option("--none", help="Deliver its results nowhere from now on.")] = False,
) -> None:
    """Print where each result goes that becomes a model's latest, or set it with --to or --none."""
    if to and none:
        raise typer.BadParameter("give --to or --none, and not both", param_hint="--to / --none")
    with session.client() as client:
        found = client.models.destinations(model)
        if to or none:
            found = client.models.set_destinations(model, to or [], version=found.version)
    if session.json:
        output.print_json(found)
        return
    for destination in found.destinations:
        output.say(destination)
    if not found.destinations:
        output.note(f"The results of {found.model} are delivered nowhere by themselves.")


def _state(delivery: ResultDeliveryView) -> str:
    if not delivery.running:
        return delivery.state
    return f"running {delivery.sent_bytes / delivery.total_bytes:.0%}" if delivery.total_bytes else "running"


def _print(session: Session, delivery: ResultDeliveryView) -> None:
    if session.json:
        output.print_json(delivery)
        return
    fields: list[tuple[str, object]] = [
        ("delivery", delivery.id),
        ("job", delivery.job_id),
        ("artifact", delivery.artifact),
        ("destination", delivery.destination),
        ("state", _state(delivery)),
        ("sent", f"{output.size_text(delivery.sent_bytes)} of {output.size_text(delivery.total_bytes)}"),
    ]
    fields += [("next try", delivery.next_at)] if delivery.next_at else []
    fields += [(name, value) for name, value in (delivery.result or {}).items() if name not in {"files", "bytes"}]
    fields += [("error", f"{delivery.error['message']} {delivery.error['hint']}")] if delivery.error else []
    output.print_fields(fields)
    rows = [
        (
            tried.number,
            f"{tried.at:%Y-%m-%d %H:%M:%S}Z",
            output.size_text(tried.sent_bytes),
            output.duration_text(tried.duration_ms / 1000),
            tried.error["message"] if tried.error else "delivered",
        )
        for tried in delivery.log
    ]
    if rows:
        output.print_table(("try", "at", "sent", "took", "outcome"), rows, right=(0, 2, 3))
