"""Signs accepted artifacts, each once, and publishes the keys that check the signatures.

The transaction that accepts an artifact adds a row to `attestations`. The control process signs it within a tick; whoever reads the statement
earlier signs it then. The first signature stays, so that every copy of an artifact carries the same one.
"""

import json
import logging
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from sqlalchemy import Engine, Row, delete, insert, select, update
from sqlalchemy.engine import Connection

from nightpress.core.database import db_now, lock_until_commit, transaction
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.attestation import key_id_of, make_statement, public_pem, sign_statement
from nightpress.core.handoff.manifest import FileEntry
from nightpress.core.handoff.report import Subject, read_report
from nightpress.core.service.tables.jobs import job_artifacts, job_reports, jobs
from nightpress.core.service.tables.signing import attestations, signing_keys
from nightpress.core.wire.results import SigningKeyView

_AT_A_TIME = 20

log = logging.getLogger(__name__)


def mark_for_signing(connection: Connection, artifact_ids: list[str]) -> None:
    """Have accepted artifacts signed, as part of the transaction that accepts them."""
    if artifact_ids:
        connection.execute(insert(attestations), [{"artifact_id": artifact_id} for artifact_id in artifact_ids])


class SigningStore:
    """The signed statements of all tenants, and this installation's public keys. Safe to share between threads."""

    def __init__(self, engine: Engine, key: EllipticCurvePrivateKey) -> None:
        self._engine = engine
        self._key = key
        self._key_id = key_id_of(key.public_key())

    def sign_pending(self) -> int:
        """Sign artifacts that have no signature yet, some at a time. Returns their number."""
        query = select(attestations.c.artifact_id).where(attestations.c.bundle.is_(None)).limit(_AT_A_TIME)
        with transaction(self._engine, read_only=True) as connection:
            waiting = connection.scalars(query).all()
        return sum(self._sign(artifact_id) is not None for artifact_id in waiting)

    def bundle(self, job_id: str, artifact_format: str) -> bytes:
        """The Sigstore bundle of an accepted artifact, as the file that accompanies it. Raises NightpressError(not_found)."""
        query = (
            select(job_artifacts.c.id, attestations.c.bundle, jobs.c.verdict)
            .join_from(job_artifacts, jobs, jobs.c.id == job_artifacts.c.job_id)
            .join(attestations, attestations.c.artifact_id == job_artifacts.c.id, isouter=True)
            .where(job_artifacts.c.job_id == job_id, job_artifacts.c.format == artifact_format)
        )
        with transaction(self._engine, read_only=True) as connection:
            row = connection.execute(query).one_or_none()
        if row is None or row.verdict != "accepted":
            raise NightpressError(
                ErrorCode.NOT_FOUND,
                "There is no signed statement of this artifact." if row else "The job has no such artifact.",
                hint="Only what was accepted is signed." if row else "GET …/artifacts lists them.",
            )
        bundle = row.bundle or self._sign(row.id)
        if bundle is None:
            raise NightpressError(
                ErrorCode.NOT_FOUND,
                "There is no signed statement of this artifact: its report does not fit its files.",
                hint="The log of the service says more. Run the job again: `nightpress retry`.",
            )
        return (json.dumps(bundle, sort_keys=True, indent=1) + "\n").encode()

    def public_keys(self) -> list[SigningKeyView]:
        """Every key that has signed here, newest first. The first signs now."""
        with transaction(self._engine) as connection:
            self._register(connection)
            rows = connection.execute(select(signing_keys).order_by(signing_keys.c.created_at.desc())).all()
        ordered = sorted(rows, key=lambda row: row.id != self._key_id)
        return [SigningKeyView(**row._mapping, current=row.id == self._key_id) for row in ordered]

    def _sign(self, artifact_id: str) -> dict[str, Any] | None:
        """Sign one artifact unless it is signed, and return its bundle. None: its report does not fit it; then it stays unsigned."""
        query = (
            select(job_artifacts, jobs.c.engine, job_reports.c.report, job_reports.c.files.label("report_files"))
            .join_from(job_artifacts, jobs, jobs.c.id == job_artifacts.c.job_id)
            .join(job_reports, job_reports.c.job_id == jobs.c.id)
            .where(job_artifacts.c.id == artifact_id)
        )
        with transaction(self._engine, read_only=True) as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            return None
        try:
            bundle = sign_statement(_statement_of(row), self._key)
        except (NightpressError, ValueError) as error:
            log.error("Artifact %s of job %s can't be signed: %s", row.format, row.job_id, error)
            with transaction(self._engine) as connection:
                connection.execute(delete(attestations).where(attestations.c.artifact_id == artifact_id))
            return None
        mine = attestations.c.artifact_id == artifact_id
        with transaction(self._engine) as connection:
            self._register(connection)
            if connection.execute(select(attestations.c.artifact_id).where(mine)).one_or_none() is None:
                connection.execute(insert(attestations).values(artifact_id=artifact_id))  # accepted before signatures
            signed = update(attestations).where(mine, attestations.c.bundle.is_(None))
            connection.execute(signed.values(bundle=bundle, key_id=self._key_id, signed_at=db_now()))
            stored: dict[str, Any] = connection.execute(select(attestations.c.bundle).where(mine)).scalar_one()
        return stored

    def _register(self, connection: Connection) -> None:
        """Publish this process's key, if it is new. Holds a lock until the commit, so that two processes don't publish it twice."""
        lock_until_commit(connection, "signing")
        known = select(signing_keys.c.id).where(signing_keys.c.id == self._key_id)
        if connection.execute(known).one_or_none() is None:
            pem = public_pem(self._key.public_key()).decode()
            row = {"id": self._key_id, "public_key": pem}
            connection.execute(insert(signing_keys).values(created_at=db_now(), **row))


def _statement_of(row: Row[Any]) -> dict[str, Any]:
    report = read_report(row.report)
    files = [FileEntry.model_validate(file) for file in row.files]
    return make_statement(
        report,
        _subject_of(report.artifacts, row.digest, row.format),
        files,
        [FileEntry.model_validate(file) for file in row.report_files],
        engine=row.engine,
    )


def _subject_of(subjects: tuple[Subject, ...], digest: str, form: str) -> Subject:
    # Reports of earlier versions have no digest of an artifact.
    fitting = [subject for subject in subjects if subject.digest == digest]
    fitting += [subject for subject in subjects if subject.digest is None and subject.format == form]
    if not fitting:
        raise ValueError(f"its report has no artifact of the digest {digest}")
    return fitting[0]
