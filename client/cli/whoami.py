"""`nightpress whoami`: what the key in use may do."""

import typer

from nightpress.client.cli import output
from nightpress.client.cli.session import Session, takes_session
from nightpress.client.cli.tenants import print_usage


def add_to(app: typer.Typer) -> None:
    app.command("whoami", rich_help_panel="Access")(takes_session(whoami))


def whoami(session: Session) -> None:
    """Print the tenant and the scopes of your key or sign-in, and how much of its quotas the tenant uses."""
    with session.client() as client:
        me = client.me()
        if session.json:
            output.print_json(me)
            return
        output.print_fields(
            [
                ("server", client.options.api_url),
                ("tenant", me.tenant_id),
                ("person", me.person and f"{me.person.name} {me.person.email}".strip()),
                ("key", None if me.person else me.key_id),
                ("scopes", ", ".join(me.scopes)),
            ]
        )
    if me.usage is not None:
        print_usage(me.quotas, me.usage)
