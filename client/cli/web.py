"""`nightpress web`: open the web page, signed in."""

import webbrowser
from typing import Annotated

import typer

from nightpress.client.cli import output
from nightpress.client.cli.session import Session, takes_session
from nightpress.client.errors import ClientError


def add_to(app: typer.Typer) -> None:
    app.command("web", rich_help_panel="This machine")(takes_session(web))


def web(
    session: Session,
    show: Annotated[bool, typer.Option("--print", help="Print the address instead of opening a browser.")] = False,
) -> None:
    """Open the web page, signed in with your key. The key follows the # of the address, which browsers don't send to a server."""
    options = session.client().options
    if options.api_key is None and options.sign_in is None:
        raise ClientError(
            "There is no API key to sign in with.", hint="Set NIGHTPRESS_API_KEY, or run `nightpress up`."
        )
    address = f"{options.api_url}/#key={options.api_key}" if options.api_key else f"{options.api_url}/#/jobs"
    if session.json:
        output.print_json({"url": address})
    elif show or not webbrowser.open(address):
        print(address)  # noqa: T201 - the key was asked for, and it holds no markup
