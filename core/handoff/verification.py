"""Checks an artifact's folder against its signed statement, without a service or a network."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.attestation import IGNORED, REPORT_NAMES, SignedArtifact, not_authentic, read_bundle
from nightpress.core.handoff.manifest import ATTESTATION_FILE
from nightpress.core.handoff.report import REPORT_FILE

Fault = Literal["changed", "missing", "not named"]


@dataclass(frozen=True)
class FileFault:
    """A file that does not fit the statement."""

    path: str
    fault: Fault


@dataclass(frozen=True)
class Verified:
    """One artifact's folder after its check: it is authentic if there are no faults."""

    folder: Path
    signed: SignedArtifact
    faults: tuple[FileFault, ...]


def find_artifacts(folder: Path) -> list[Path]:
    """The folders with a statement: `folder` itself, or those directly in it. Raises NightpressError(not_authentic) if there are none."""
    if (folder / ATTESTATION_FILE).is_file():
        return [folder]
    found = sorted(path.parent for path in folder.glob(f"*/{ATTESTATION_FILE}"))
    if not found:
        raise not_authentic(f"{folder} holds no {ATTESTATION_FILE}, nor does a folder in it")
    return found


def verify_folder(folder: Path, keys: Sequence[EllipticCurvePublicKey]) -> list[Verified]:
    """Check each artifact in a folder: a delivered artifact, or what `nightpress pull` has filled.

    The signature, every byte of the artifact, and the reports in its folder and in `folder`, with their figures.
    Raises NightpressError(not_authentic) if a statement is missing, damaged or signed by another key.
    """
    found = []
    for artifact in find_artifacts(folder):
        signed = read_bundle((artifact / ATTESTATION_FILE).read_bytes(), keys)
        faults = [*_faults_of_files(artifact, signed.files), *_faults_of_reports(artifact, signed)]
        if artifact != folder:
            faults += _faults_of_reports(folder, signed, prefix="../")
        found.append(Verified(artifact, signed, tuple(faults)))
    return found


def verify_report(report: Path, keys: Sequence[EllipticCurvePublicKey]) -> SignedArtifact | None:
    """The statement that names a report.json, in its folder or in one directly in it. None: no statement lies there.

    Raises NightpressError(not_authentic) if there is one, and it is not signed by one of the keys, or is about another report.
    """
    bundles = [report.parent / ATTESTATION_FILE, *sorted(report.parent.glob(f"*/{ATTESTATION_FILE}"))]
    for bundle in (path for path in bundles if path.is_file()):
        signed = read_bundle(bundle.read_bytes(), keys)
        if signed.reports.get(REPORT_FILE) != _sha256(report):
            raise not_authentic(f"{report} is not the report that was signed")
        return signed
    return None


def _faults_of_files(folder: Path, files: Mapping[str, str]) -> Iterator[FileFault]:
    for path, sha256 in files.items():
        if not (folder / path).is_file():
            yield FileFault(path, "missing")
        elif _sha256(folder / path) != sha256:
            yield FileFault(path, "changed")
    for present in sorted(folder.rglob("*")):
        name = present.relative_to(folder)
        if not present.is_dir() and name.as_posix() not in files and name.parts[0] not in IGNORED:
            yield FileFault(name.as_posix(), "not named")


def _faults_of_reports(folder: Path, signed: SignedArtifact, prefix: str = "") -> Iterator[FileFault]:
    """Faults of the reports in a folder. A report that isn't there is no fault: the figures stand in the statement."""
    for name, report in REPORT_NAMES.items():
        path = folder / name
        if name in signed.files or not path.is_file():
            continue
        if report not in signed.reports:
            yield FileFault(prefix + name, "not named")
        elif _sha256(path) != signed.reports[report]:
            yield FileFault(prefix + name, "changed")


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise NightpressError(
            ErrorCode.NOT_AUTHENTIC, f"{path} can't be read: {error.strerror}.", hint="Check its permissions."
        ) from error
