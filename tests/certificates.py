"""Certificates for tests over TLS, made by the `openssl` command. Without that command, these tests are skipped with a reason."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Certificate:
    """A self-signed certificate: a client that trusts only `chain` trusts only this server."""

    chain: Path
    key: Path


def make_certificate(folder: Path, name: str) -> Certificate:
    """Make a certificate for one DNS name, valid for two days."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl command here: `apt-get install openssl`")
    made = Certificate(folder / f"{name}.pem", folder / f"{name}.key")
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc", "-days", "2"]
    said = [
        "-subj",
        f"/CN={name}",
        "-addext",
        f"subjectAltName=DNS:{name}",
        "-addext",
        "keyUsage=digitalSignature,keyCertSign",
    ]
    subprocess.run(
        ["openssl", "req", "-x509", *curve, *said, "-keyout", made.key, "-out", made.chain],
        check=True,
        capture_output=True,
    )
    return made
