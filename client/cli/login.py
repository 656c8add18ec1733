"""`nightpress login`, `logout` and `sessions`: signing in by the organisation's accounts."""

import webbrowser
from typing import Annotated

import typer

from nightpress.client import device_flow
from nightpress.client.cli import output
from nightpress.client.cli.session import Session, takes_session
from nightpress.client.client import Client
from nightpress.client.device_flow import Invitation
from nightpress.client.errors import ClientError
from nightpress.client.sign_ins import SignedIn, read_sign_in, save_sign_in

sessions = typer.Typer(invoke_without_command=True, help="Sessions of people on the page: list, end.")


def add_to(app: typer.Typer) -> None:
    app.command("login", rich_help_panel="Access")(takes_session(login))
    app.command("logout", rich_help_panel="Access")(takes_session(logout))
    app.add_typer(sessions, name="sessions", rich_help_panel="Access")


def login(
    session: Session,
    tenant: Annotated[
        str | None, typer.Option("--tenant", metavar="TENANT", help="Where to act, if you belong to several tenants.")
    ] = None,
    browser: Annotated[bool, typer.Option("--browser", help="Also open the address in a browser here.")] = False,
) -> None:
    """Sign in with your organisation's account. It needs a browser on any device; no key is needed afterwards."""
    url = _url(session)
    with Client(url, "none") as client:  # not with an earlier sign-in, which may have ended
        provider = client.sign_in_provider()
    if not provider.issuer:
        raise ClientError(
            f"{url} takes API keys only.",
            hint="Ask its operator for a key, and store it with `nightpress servers add`.",
        )

    def invite(invitation: Invitation) -> None:
        output.note(f"Open {invitation.url} in a browser and enter the code {invitation.code}.")
        address = invitation.direct or invitation.url
        if browser and address.startswith(("https://", "http://")):
            webbrowser.open(address)

    tokens = device_flow.sign_in(provider, invite)
    signed_in = SignedIn(
        provider.issuer,
        provider.client_id,
        device_flow.token_url_of(provider.issuer),
        tokens.id_token,
        tokens.expires_at,
        tokens.refresh_token,
        tenant,
    )
    before = read_sign_in(url)
    path = save_sign_in(url, signed_in)
    try:
        with session.client() as client:
            me = client.me()
    except Exception:
        save_sign_in(url, before)  # a sign-in that the API refuses is not kept
        raise
    if session.json:
        output.print_json({"api_url": url, **me.model_dump(mode="json", include={"person", "tenant_id", "scopes"})})
    else:
        name = me.person.name if me.person is not None else me.key_id
        output.say(f"You are {name}, in the tenant {me.tenant_id}. The sign-in is kept in {path}.")
    if me.person is None:
        output.note("Commands go on with the API key that is set, from NIGHTPRESS_API_KEY or the profile: remove it.")


def logout(session: Session) -> None:
    """Remove your sign-in at the server from this machine."""
    url = _url(session)
    there = read_sign_in(url) is not None
    save_sign_in(url, None)
    if session.json:
        output.print_json({"api_url": url, "removed": there})
    else:
        output.say(f"You are signed out of {url}." if there else f"You were not signed in at {url}.")


def _url(session: Session) -> str:
    with session.client() as client:
        return client.options.api_url


@sessions.callback()
@takes_session
def list_sessions(session: Session, context: typer.Context) -> None:
    if context.invoked_subcommand:
        return
    with session.client() as client:
        found = list(client.sessions.iterate())
    if session.json:
        output.print_json(found)
        return
    rows = [
        (
            entry.id,
            entry.name,
            entry.email,
            "live" if entry.live else entry.reason or "over",
            output.ago_text(entry.seen_at),
        )
        for entry in found
    ]
    output.print_table(("session", "person", "e-mail", "state", "used"), rows)


@sessions.command("rm")
@takes_session
def end_session(
    session: Session, name: Annotated[str, typer.Argument(metavar="SESSION", help="As `nightpress sessions` lists it.")]
) -> None:
    """End a session of your tenant. It stops working within five seconds; the person can sign in again."""
    with session.client() as client:
        client.sessions.end(name)
    output.print_json({"ended": name}) if session.json else output.say(f"{name} is ended.")
