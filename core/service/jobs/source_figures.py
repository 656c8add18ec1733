"""Which outputs of sources are in storage: one row for each digest of `core.handoff.source_outputs`. The only writer of the table.

A digest contains the tenant, so no row serves another tenant. Losing a row or its object does no harm: the next job measures its source.
"""

from dataclasses import dataclass

from sqlalchemy import ColumnElement, Engine, delete, false, or_, select, update
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from nightpress.core.database import db_now, transaction
from nightpress.core.service.tables.jobs import source_figures

_PRUNE_BATCH = 100
_columns = source_figures.c


@dataclass(frozen=True, slots=True)
class KeptSource:
    """The stored outputs of a source."""

    job_id: str  #: the job that measured them
    sha256: str
    size: int


def folder_of(digest: str) -> str:
    """The folder in storage that holds a source's outputs."""
    return f"sources/{digest}"


def key_of(digest: str, sha256: str) -> str:
    return f"{folder_of(digest)}/{sha256}"


class SourceFigures:
    """Reads and writes the table. Safe to share between threads and processes."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def take(self, digest: str) -> KeptSource | None:
        """What is kept under this digest, marked as used now. None if there is nothing, or a user wants it measured anew."""
        used = (
            update(source_figures)
            .where(_columns.digest == digest, _columns.outdated == false())
            .values(used_at=db_now())
            .returning(_columns.job_id, _columns.sha256, _columns.size)
        )
        with transaction(self._engine) as connection:
            row = connection.execute(used).one_or_none()
        return None if row is None else KeptSource(row.job_id, row.sha256, row.size)

    def put(self, digest: str, kept: KeptSource, *, tenant_id: str, model_digest: str) -> str | None:
        """Record outputs that are in storage. They replace what the digest had. Returns the SHA-256 of other bytes that it had."""
        kind = sqlite_insert if self._engine.dialect.name == "sqlite" else postgresql_insert
        new = {
            "job_id": kept.job_id,
            "sha256": kept.sha256,
            "size": kept.size,
            "outdated": False,
            "measured_at": db_now(),
            "used_at": db_now(),
        }
        put = (
            kind(source_figures)
            .values(digest=digest, tenant_id=tenant_id, model_digest=model_digest, **new)
            .on_conflict_do_update(index_elements=["digest"], set_=new)
        )
        with transaction(self._engine) as connection:
            before = connection.execute(select(_columns.sha256).where(_columns.digest == digest)).scalar_one_or_none()
            connection.execute(put)
        return before if before != kept.sha256 else None

    def outdate(self, tenant_id: str, model_digest: str) -> None:
        """Let the tenant's next job on this model measure its source anew, for every evaluation."""
        mine = (_columns.tenant_id == tenant_id, _columns.model_digest == model_digest)
        with transaction(self._engine) as connection:
            connection.execute(update(source_figures).where(*mine).values(outdated=True))

    def due(self, older_than_s: float) -> list[str]:
        """Digests of outputs that are outdated, or that no job has used for `older_than_s` seconds."""
        query = select(_columns.digest).where(_unused(older_than_s)).limit(_PRUNE_BATCH)
        with transaction(self._engine, read_only=True) as connection:
            return list(connection.execute(query).scalars())

    def prune(self, digest: str, older_than_s: float) -> None:
        """Remove the row of outputs that were deleted. If a job has used it since, the row stays, and the next job finds no object."""
        with transaction(self._engine) as connection:
            connection.execute(delete(source_figures).where(_columns.digest == digest, _unused(older_than_s)))


def _unused(older_than_s: float) -> ColumnElement[bool]:
    return or_(_columns.used_at < db_now(-older_than_s), _columns.outdated)
