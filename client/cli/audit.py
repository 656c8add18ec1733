"""`nightpress audit`: who changed what, for administrators."""

from itertools import islice
from typing import Annotated

import typer

from nightpress.client.cli import output
from nightpress.client.cli.session import Session, takes_session


def add_to(app: typer.Typer) -> None:
    app.command("audit", rich_help_panel="Access")(takes_session(audit))


def audit(
    session: Session,
    tenant: Annotated[str | None, typer.Option("--tenant", metavar="TENANT", help="Only this tenant's.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="How many, newest first.")] = 50,
) -> None:
    """List which key changed what, newest first. For administrators."""
    with session.client() as client:
        found = list(islice(client.tenants.audit(tenant_id=tenant, limit=min(limit, 200)), limit))
    if session.json:
        for entry in found:
            output.print_json(entry)
        return
    rows = [
        (
            f"{entry.at:%Y-%m-%d %H:%M:%S}Z",
            entry.tenant_id,
            entry.key_id,
            entry.status,
            entry.action,
            entry.subject,
        )
        for entry in found
    ]
    output.print_table(("at", "tenant", "key", "status", "action", "on"), rows, right=(3,))
