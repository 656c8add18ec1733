"""`nightpress verify` and `nightpress signing-keys`: whether an artifact is what a service has signed."""

from pathlib import Path
from typing import Annotated, Any

import typer

from nightpress.client.cli import output
from nightpress.client.cli.exits import Exit
from nightpress.client.cli.session import Session, takes_session
from nightpress.core.handoff.attestation import read_public_keys
from nightpress.core.handoff.verification import Verified, verify_folder

Keys = Annotated[
    Path | None,
    typer.Option(
        "--key",
        metavar="FILE",
        help="The public keys, as `signing-keys --out` wrote them: nothing is asked over the network. Otherwise the server is asked.",
        exists=True,
        dir_okay=False,
    ),
]


def add_to(app: typer.Typer) -> None:
    app.command("verify", rich_help_panel="Results")(takes_session(verify))
    app.command("signing-keys", rich_help_panel="Results")(takes_session(signing_keys))


def signing_keys(
    session: Session,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write them to this file, for `verify --key`.")
    ] = None,
) -> None:
    """Print the public keys that check the signatures of a server's artifacts. Keep them where nobody else writes."""
    with session.client() as client:
        found = client.signing_keys()
    pem = "".join(key.public_key for key in found)
    if out is not None:
        out.write_text(pem)
    if session.json:
        output.print_json(found)
    elif out is not None:
        output.note(f"Written: {out}")
    else:
        for key in found:
            output.note(f"{key.id}{' (in use)' if key.current else ''}")
        output.say(pem.rstrip())


def verify(
    session: Session,
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="A delivered artifact, or what `pull` has filled.", exists=True, file_okay=False
        ),
    ],
    key: Keys = None,
) -> None:
    """Check an artifact's signature, every byte of it, and the figures of its report. Exit status 9 if anything was changed."""
    if key is not None:
        keys = read_public_keys(key.read_bytes())
    else:
        with session.client() as client:
            keys = read_public_keys("".join(found.public_key for found in client.signing_keys()).encode())
    found = verify_folder(folder, keys)
    if session.json:
        output.print_json([_as_dict(artifact) for artifact in found])
    else:
        for artifact in found:
            _print(artifact)
    if any(artifact.faults for artifact in found):
        raise typer.Exit(Exit.NOT_AUTHENTIC)


def _as_dict(artifact: Verified) -> dict[str, Any]:
    return {
        "folder": str(artifact.folder),
        "authentic": not artifact.faults,
        "key": artifact.signed.key_id,
        "files": len(artifact.signed.files),
        "faults": [{"path": fault.path, "fault": fault.fault} for fault in artifact.faults],
        "statement": artifact.signed.claims,
    }


def _print(artifact: Verified) -> None:
    signed = artifact.signed
    claims = signed.claims
    output.print_fields(
        [
            ("folder", artifact.folder),
            ("signed by", signed.key_id),
            ("job", claims["job"]),
            ("source", f"{claims['source']['name']} {claims['source']['digest']}"),
            ("recipe", claims["recipe"].get("name")),
            ("engine", claims["engine"]),
            ("verdict", claims["verdict"]),
        ]
    )
    rows = []
    for figure in claims["figures"]:
        ends = f"[{figure['low']:.6g}, {figure['high']:.6g}]" if figure["low"] is not None else ""
        rows.append((f"{figure['name']} {figure['of']}".strip(), figure["data"], f"{figure['value']:.6g}", ends))
    if rows:
        output.print_table(("figure", "data", "value", "95% interval"), rows, right=(2, 3))
    for fault in artifact.faults:
        said = "is not named in the statement" if fault.fault == "not named" else f"is {fault.fault}"
        output.say(f"{fault.path} {said}", "red")
    if artifact.faults:
        output.say("Not authentic: this is not what was signed.", "red")
    else:
        output.say(f"Authentic: the signature, {len(signed.files)} files and the reports beside them.", "green")
