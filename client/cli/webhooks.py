"""`nightpress webhooks …`: addresses, channels and mailboxes that are told when something has happened."""

from itertools import islice
from typing import Annotated, Any, get_args

import typer

from nightpress.client.cli import output
from nightpress.client.cli.session import Session, takes_session
from nightpress.core.wire.webhooks import (
    TEMPLATE_FIELDS,
    DeliveryView,
    NewWebhookView,
    WebhookEvent,
    WebhookKind,
    WebhookView,
)

webhooks = typer.Typer(
    invoke_without_command=True,
    help="Webhooks: list, add, show, edit, rotate the secret, test, deliveries, redeliver, remove.",
)

Hook = Annotated[str, typer.Argument(metavar="WEBHOOK", help="Its id.")]
Event = Annotated[
    list[str] | None,
    typer.Option("--event", "-e", metavar="EVENT", help=f"{', '.join(get_args(WebhookEvent))}; may be repeated."),
]
Words = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help=f"For Slack and e-mail: the text, with {', '.join('$' + name for name in TEMPLATE_FIELDS)} filled in. The first line is a mail's subject.",
    ),
]
_EVERY_EVENT = ["job.succeeded", "job.failed", "job.cancelled"]


def add_to(app: typer.Typer) -> None:
    app.add_typer(webhooks, name="webhooks", rich_help_panel="Access")


@webhooks.callback()
@takes_session
def list_webhooks(session: Session, context: typer.Context) -> None:
    if context.invoked_subcommand:
        return
    with session.client() as client:
        found = list(client.webhooks.iterate())
    if session.json:
        output.print_json(found)
        return
    rows = [(webhook.id, webhook.url, ", ".join(webhook.events), _state(webhook)) for webhook in found]
    output.print_table(("webhook", "address", "events", "state"), rows)


@webhooks.command("add")
@takes_session
def add(
    session: Session,
    url: Annotated[str, typer.Argument(metavar="URL", help="An address of the web, or mailto:NAME@DOMAIN.")],
    event: Event = None,
    slack: Annotated[bool, typer.Option("--slack", help="The address is an incoming webhook of Slack.")] = False,
    template: Words = None,
) -> None:
    """Tell an address when jobs end, or of other events. Prints the secret that signs messages; it is shown this once."""
    wanted: Any = event or _EVERY_EVENT
    kind: WebhookKind = "slack" if slack else "email" if url.startswith("mailto:") else "standard"
    with session.client() as client:
        _print_new(session, client.webhooks.create(url, wanted, kind=kind, template=template or ""))


@webhooks.command("show")
@takes_session
def show(session: Session, webhook: Hook) -> None:
    """Print a webhook's address, events and state."""
    with session.client() as client:
        _print(session, client.webhooks.get(webhook))


@webhooks.command("edit")
@takes_session
def edit(
    session: Session,
    webhook: Hook,
    url: Annotated[str | None, typer.Option(metavar="URL")] = None,
    event: Event = None,
    template: Words = None,
    enabled: Annotated[bool | None, typer.Option("--on/--off", help="Send messages, or send none.")] = None,
) -> None:
    """Change the given options of a webhook. Options that are not given stay as they are."""
    given = {"url": url, "events": event, "template": template, "enabled": enabled}
    with session.client() as client:
        found = client.webhooks.get(webhook)
        changes = {key: value for key, value in given.items() if value is not None}
        _print(session, client.webhooks.edit(webhook, version=found.version, **changes))


@webhooks.command("rotate")
@takes_session
def rotate(
    session: Session,
    webhook: Hook,
    overlap: Annotated[
        float, typer.Option(min=0, help="Seconds for which messages carry signatures by both secrets.")
    ] = 24 * 3600.0,
) -> None:
    """Make a new secret and print it. It is shown this once."""
    with session.client() as client:
        _print_new(session, client.webhooks.rotate(webhook, overlap_s=overlap))


@webhooks.command("test")
@takes_session
def test(session: Session, webhook: Hook) -> None:
    """Send a test message, to see whether it arrives."""
    with session.client() as client:
        _print_sent(session, client.webhooks.test(webhook))


@webhooks.command("deliveries")
@takes_session
def deliveries(
    session: Session,
    webhook: Hook,
    delivery: Annotated[
        str | None, typer.Argument(metavar="[DELIVERY]", help="Print only this delivery, with every try.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="How many, newest first.")] = 20,
) -> None:
    """List the messages to a webhook and whether each arrived."""
    with session.client() as client:
        if delivery is not None:
            _print_tries(session, client.webhooks.delivery(webhook, delivery))
            return
        found = list(islice(client.webhooks.deliveries(webhook, limit=min(limit, 200)), limit))
    if session.json:
        output.print_json(found)
        return
    rows = [
        (delivery.id, delivery.event, delivery.state, delivery.attempts, output.ago_text(delivery.created_at))
        for delivery in found
    ]
    output.print_table(("delivery", "event", "state", "tries", "made"), rows, right=(3,))


@webhooks.command("redeliver")
@takes_session
def redeliver(session: Session, webhook: Hook, delivery: Annotated[str, typer.Argument(metavar="DELIVERY")]) -> None:
    """Send a message again, whether it arrived before or not."""
    with session.client() as client:
        _print_sent(session, client.webhooks.redeliver(webhook, delivery))


@webhooks.command("rm")
@takes_session
def remove(session: Session, webhook: Hook) -> None:
    """Delete a webhook and its deliveries."""
    with session.client() as client:
        client.webhooks.delete(webhook)
    output.print_json({"removed": webhook}) if session.json else output.say(f"{webhook} is gone.")


def _state(webhook: WebhookView) -> str:
    return "on" if webhook.enabled else f"off: {webhook.disabled_reason}" if webhook.disabled_reason else "off"


def _print(session: Session, webhook: WebhookView) -> None:
    if session.json:
        output.print_json(webhook)
        return
    fields = [
        ("webhook", webhook.id),
        ("address", webhook.url),
        ("kind", webhook.kind),
        ("template", webhook.template),
        ("events", ", ".join(webhook.events)),
        ("state", _state(webhook)),
    ]
    output.print_fields([*fields, ("made", webhook.created_at)])


def _print_new(session: Session, made: NewWebhookView) -> None:
    if session.json:
        output.print_json(made)
        return
    _print(session, made.webhook)
    if made.secret is None:
        return
    output.say(f"secret   {made.secret}")
    output.note("Keep the secret: it is shown this once. Messages are signed as standardwebhooks.com specifies.")


def _print_sent(session: Session, sent: DeliveryView) -> None:
    if session.json:
        output.print_json(sent)
        return
    output.say(f"{sent.id}: `nightpress webhooks deliveries {sent.webhook_id} {sent.id}` shows whether it arrived.")


def _print_tries(session: Session, delivery: DeliveryView) -> None:
    if session.json:
        output.print_json(delivery)
        return
    output.print_fields(
        [
            ("delivery", delivery.id),
            ("event", delivery.event),
            ("state", delivery.state),
            ("next try", delivery.next_at),
        ]
    )
    rows = [
        (
            tried.number,
            f"{tried.at:%Y-%m-%d %H:%M:%S}Z",
            tried.status or "",
            f"{tried.duration_ms} ms",
            tried.error or "",
        )
        for tried in delivery.log
    ]
    if rows:
        output.print_table(("try", "at", "status", "took", "error"), rows, right=(0, 2, 3))
