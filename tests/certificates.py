"""Certificates for the tests that speak TLS, made by the `openssl` command; they are skipped, with the reason, where there is none."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Certificate:
    """Signed by itself, so that whoever trusts `chain` trusts this server and no other."""

    chain: Path
    key: Path


def make_certificate(folder: Path, name: str) -> Certificate:
    """For one DNS name, for two days."""
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
