"""`nightpress credentials …`: what destinations are reached with. Secrets are asked for or read from a file, never taken as arguments."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from nightpress.client.cli import output
from nightpress.client.cli.session import Session, takes_session
from nightpress.client.errors import ClientError
from nightpress.core.wire.deliveries import SECRETS_OF, CredentialView

credentials = typer.Typer(
    invoke_without_command=True, help="Credentials of destinations: list, add, rotate, remove. Secrets are never shown."
)

Credential = Annotated[str, typer.Argument(metavar="CREDENTIAL", help="Its id.")]
From = Annotated[
    Path | None,
    typer.Option(
        "--from",
        metavar="FILE",
        help="A file with a NAME=VALUE line for each secret; - reads standard input. Otherwise they are asked for.",
    ),
]


def add_to(app: typer.Typer) -> None:
    app.add_typer(credentials, name="credentials", rich_help_panel="Access")


@credentials.callback()
@takes_session
def list_credentials(session: Session, context: typer.Context) -> None:
    if context.invoked_subcommand:
        return
    with session.client() as client:
        found = list(client.credentials.iterate())
    if session.json:
        output.print_json(found)
        return
    rows = [(stored.id, stored.prefix, output.ago_text(stored.rotated_at), stored.created_by or "") for stored in found]
    output.print_table(("credential", "for", "stored", "by"), rows)


@credentials.command("add")
@takes_session
def add(
    session: Session,
    prefix: Annotated[
        str,
        typer.Argument(metavar="PREFIX", help="E.g. hf://acme, s3://models/released or oci://registry.example.com."),
    ],
    source: From = None,
) -> None:
    """Store credentials for the destinations below a prefix: of hf a token, of s3 a key, of oci a user and a password."""
    secrets = _secrets(prefix, source)
    with session.client() as client:
        _print(session, client.credentials.create(prefix, secrets))


@credentials.command("rotate")
@takes_session
def rotate(session: Session, credential: Credential, source: From = None) -> None:
    """Replace the secrets. Each delivery uses the new ones from its next try on."""
    with session.client() as client:
        stored = client.credentials.get(credential)
        _print(session, client.credentials.rotate(credential, _secrets(stored.prefix, source)))


@credentials.command("show")
@takes_session
def show(session: Session, credential: Credential) -> None:
    """Print what stored credentials are for, and when they were stored."""
    with session.client() as client:
        _print(session, client.credentials.get(credential))


@credentials.command("rm")
@takes_session
def remove(session: Session, credential: Credential) -> None:
    """Delete credentials. Deliveries that need them fail."""
    with session.client() as client:
        client.credentials.delete(credential)
    output.print_json({"removed": credential}) if session.json else output.say(f"{credential} is gone.")


def _secrets(prefix: str, source: Path | None) -> dict[str, str]:
    names = SECRETS_OF.get(prefix.partition("://")[0])
    if names is None:
        raise ClientError(f"{prefix} is not a prefix of destinations.", hint="It begins with s3://, hf:// or oci://.")
    if source is None:
        return {name: typer.prompt(name.replace("_", " "), hide_input=True, err=True) for name in sorted(names)}
    text = sys.stdin.read() if str(source) == "-" else source.read_text()
    given = dict(line.partition("=")[::2] for line in text.splitlines() if line.strip())
    if given.keys() != names:
        raise ClientError(
            f"{source} does not hold exactly {' and '.join(sorted(names))}.", hint="A line for each: NAME=VALUE."
        )
    return given


def _print(session: Session, stored: CredentialView) -> None:
    if session.json:
        output.print_json(stored)
        return
    output.print_fields(
        [("credential", stored.id), ("for", stored.prefix), ("stored", stored.rotated_at), ("version", stored.version)]
    )
