"""`nightpress mcp`: a server for assistants that speak the Model Context Protocol."""

import typer

from nightpress.client.cli.session import Session, takes_session
from nightpress.client.errors import ClientError


def add_to(app: typer.Typer) -> None:
    app.command("mcp", rich_help_panel="Service")(takes_session(serve))


def serve(session: Session) -> None:
    """Serve the Model Context Protocol over standard input and output: tools to submit, search, read reports and promote, with your key."""
    try:
        from nightpress.client.mcp_server import make_server
    except ImportError as error:
        raise ClientError(
            f"The library for it is missing: {error}.", hint="Install it: pip install 'nightpress[mcp]'."
        ) from error
    with session.client() as client:
        make_server(client).run("stdio")
