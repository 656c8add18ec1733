"""`nightpress servers …`: named servers with their keys, for `--profile`."""

import sys
from typing import Annotated

import typer

from nightpress.client.cli import output
from nightpress.client.cli.session import Session, takes_session
from nightpress.client.client import Client
from nightpress.client.discovery import clean_url
from nightpress.client.errors import ClientError
from nightpress.client.servers import KnownServer, check_name, read_servers, save_servers

servers = typer.Typer(
    invoke_without_command=True, help="Named servers, for --profile: list, add, choose the default, remove."
)

Named = Annotated[str, typer.Argument(metavar="NAME")]


def add_to(app: typer.Typer) -> None:
    app.add_typer(servers, name="servers", rich_help_panel="This machine")


@servers.callback()
@takes_session
def list_servers(session: Session, context: typer.Context) -> None:
    if context.invoked_subcommand:
        return
    found = read_servers()
    rows = [
        {"name": name, "api_url": server.api_url, "key": bool(server.api_key), "default": name == found.default}
        for name, server in sorted(found.known.items())
    ]
    if session.json:
        output.print_json(rows)
        return
    marks = [
        (row["name"], row["api_url"], "yes" if row["key"] else "", "default" if row["default"] else "") for row in rows
    ]
    output.print_table(("server", "address", "key", ""), marks)


@servers.command("add")
@takes_session
def add(
    session: Session,
    name: Named,
    url: Annotated[str, typer.Argument(metavar="URL")],
    use: Annotated[bool, typer.Option("--use", help="Make it the default server.")] = False,
    unchecked: Annotated[bool, typer.Option("--unchecked", help="Store it without trying the key.")] = False,
) -> None:
    """Store a server and its key. The key is asked for or read from standard input, so that it stands in no shell history."""
    check_name(name)
    known = read_servers()
    url = clean_url(url)
    key = (
        typer.prompt("API key", hide_input=True, err=True) if sys.stdin.isatty() else sys.stdin.readline()
    ).strip() or None
    if not unchecked:
        if key is None:
            raise ClientError("No key came on standard input.", hint="Type it when it is asked for, or pipe it in.")
        with Client(url, key) as client:
            me = client.me()
        if not session.json:
            output.note(f"The key is {me.key_id} of tenant {me.tenant_id}.")
    known.known[name] = KnownServer(url, key)
    if use:
        known.default = name
    path = save_servers(known)
    if session.json:
        output.print_json({"name": name, "api_url": url, "default": known.default == name})
    else:
        output.say(f"{name} is {url}, in {path}.")


@servers.command("use")
@takes_session
def use_server(session: Session, name: Named) -> None:
    """Make this server the default: it is used where no server is named."""
    known = read_servers()
    server = known.get(name)
    known.default = name
    save_servers(known)
    output.print_json({"default": name}) if session.json else output.say(f"{name} ({server.api_url}) is the default.")


@servers.command("rm")
@takes_session
def remove(session: Session, name: Named) -> None:
    """Remove a server and its key from this machine. The key itself stays valid; `nightpress keys rm` revokes a key."""
    known = read_servers()
    known.get(name)
    del known.known[name]
    if known.default == name:
        known.default = None
    save_servers(known)
    output.print_json({"removed": name}) if session.json else output.say(f"{name} is gone.")
