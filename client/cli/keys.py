"""`nightpress keys …`: list, add, show, rotate and revoke API keys."""

from typing import Annotated

import typer

from nightpress.client.cli import output
from nightpress.client.cli.session import Session, takes_session
from nightpress.core.wire.access import KeyView, NewKeyView

keys = typer.Typer(invoke_without_command=True, help="API keys: list, add, show, rotate, revoke.")

KeyArgument = Annotated[str, typer.Argument(metavar="KEY", help="Its id, as `nightpress keys` lists it.")]
TenantOption = Annotated[
    str | None, typer.Option("--tenant", metavar="TENANT", help="For another tenant; administrators only.")
]


def add_to(app: typer.Typer) -> None:
    app.add_typer(keys, name="keys", rich_help_panel="Access")


@keys.callback()
@takes_session
def list_keys(session: Session, context: typer.Context, tenant: TenantOption = None) -> None:
    if context.invoked_subcommand:
        return
    with session.client() as client:
        found = list(client.keys.iterate(tenant_id=tenant))
    if session.json:
        output.print_json(found)
        return
    rows = [(key.id, key.name, ", ".join(key.scopes), _state(key), output.ago_text(key.last_used_at)) for key in found]
    output.print_table(("key", "name", "scopes", "state", "used"), rows)


@keys.command("add")
@takes_session
def add_key(
    session: Session,
    name: Annotated[str, typer.Argument(metavar="NAME", help="What it is for.")],
    scope: Annotated[
        list[str], typer.Option("--scope", "-s", metavar="SCOPE", help="E.g. jobs:read; may be repeated.")
    ],
    days: Annotated[float | None, typer.Option(min=0.001, help="It expires after so many days.")] = None,
    tenant: TenantOption = None,
) -> None:
    """Make a key and print it. It is shown this once, and can do no more than your own key."""
    seconds = None if days is None else days * 24 * 3600
    with session.client() as client:
        _print_new(session, client.keys.create(name, scope, expires_in_s=seconds, tenant_id=tenant))


@keys.command("show")
@takes_session
def show_key(session: Session, key: KeyArgument) -> None:
    """Print what is known about a key, without its secret."""
    with session.client() as client:
        _print_key(session, client.keys.get(key))


@keys.command("rotate")
@takes_session
def rotate_key(
    session: Session,
    key: KeyArgument,
    overlap: Annotated[float, typer.Option(min=0, help="Seconds for which the old key keeps working.")] = 3600.0,
) -> None:
    """Make a new key with the same rights in place of an old one, and print it. It is shown this once."""
    with session.client() as client:
        _print_new(session, client.keys.rotate(key, overlap_s=overlap))


@keys.command("rm")
@takes_session
def revoke_key(session: Session, key: KeyArgument) -> None:
    """Revoke a key for good. It stops working within five seconds."""
    with session.client() as client:
        client.keys.revoke(key)
    output.print_json({"revoked": key}) if session.json else output.say(f"{key} is revoked.")


def _state(key: KeyView) -> str:
    if key.revoked_at is not None:
        return "revoked"
    if key.expires_at is None:
        return "good"
    return f"{'expired' if key.expired else 'good until'} {key.expires_at:%Y-%m-%d %H:%M}Z"


def _print_key(session: Session, key: KeyView) -> None:
    if session.json:
        output.print_json(key)
        return
    output.print_fields(
        [
            ("key", key.id),
            ("name", key.name),
            ("tenant", key.tenant_id),
            ("scopes", ", ".join(key.scopes)),
            ("state", _state(key)),
            ("follows", key.rotated_from),
            ("used", key.last_used_at),
        ]
    )


def _print_new(session: Session, created: NewKeyView) -> None:
    if session.json:
        output.print_json(created)
        return
    _print_key(session, created.record)
    output.say(created.key)
    output.note("Keep the key: it is shown this once.")
