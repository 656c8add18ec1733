"""The index of the checkpoints in storage: one row per prefix of a recipe, one row per file. The only writer of both tables.

A prefix of a recipe is its first passes. One attempt at a time writes a prefix, so that all its files come from the same computation.
Losing checkpoints does no harm: a job that finds fewer of them continues from an earlier step.
"""

from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Engine, delete, exists, func, insert, select, update
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from nightpress.core.database import db_now, transaction
from nightpress.core.service.jobs.records import Lease
from nightpress.core.service.jobs.states import ALL_STATES, is_terminal
from nightpress.core.service.tables.jobs import checkpoint_files, checkpoints, jobs

_LIVE_STATES = tuple(state for state in ALL_STATES if not is_terminal(state))
_PRUNE_BATCH = 100


@dataclass(frozen=True, slots=True)
class StoredFile:
    path: str  #: relative to work/
    size: int
    sha256: str
    step: int
    job_id: str  #: the job whose attempt wrote it


def folder_of(digest: str) -> str:
    """The folder in storage that holds the files of a prefix."""
    return f"checkpoints/{digest}"


def key_of(digest: str, file: StoredFile) -> str:
    return f"{folder_of(digest)}/{file.sha256}"


class CheckpointIndex:
    """Reads and writes the index. Safe to share between threads and processes."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def take(self, lease: Lease, digest: str) -> bool:
        """Reserve the prefix for this attempt. Returns False if another running attempt writes it."""
        kind = sqlite_insert if self._engine.dialect.name == "sqlite" else postgresql_insert
        mine = {"job_id": lease.job_id, "lease_id": lease.lease_id, "used_at": db_now()}
        taken = (
            kind(checkpoints)
            .values(digest=digest, size=0, **mine)
            .on_conflict_do_update(index_elements=["digest"], set_=mine, where=~_held(checkpoints.c.lease_id))
            .returning(checkpoints.c.digest)
        )
        with transaction(self._engine) as connection:
            return connection.execute(taken).scalar_one_or_none() is not None

    def files(self, digest: str) -> dict[str, StoredFile]:
        """The stored files of a prefix, by path."""
        columns = checkpoint_files.c
        query = select(columns.path, columns.size, columns.sha256, columns.step, columns.job_id)
        with transaction(self._engine, read_only=True) as connection:
            return {row.path: StoredFile(*row) for row in connection.execute(query.where(columns.digest == digest))}

    def add(self, lease: Lease, digest: str, file: StoredFile, *, limit: int) -> bool:
        """Add a file whose bytes are in storage. It replaces a file of the same path.

        False: the prefix is no longer reserved for this attempt, or would have more than `limit` bytes. Then nothing is written.
        """
        here = checkpoint_files.c.digest == digest
        with transaction(self._engine) as connection:
            replaced = select(checkpoint_files.c.size).where(here, checkpoint_files.c.path == file.path)
            size = checkpoints.c.size + file.size - (connection.execute(replaced).scalar_one_or_none() or 0)
            mine = (checkpoints.c.digest == digest, _held(lease.lease_id))
            grown = update(checkpoints).where(*mine, size <= limit).values(size=size, used_at=db_now())
            if not connection.execute(grown).rowcount:
                return False
            connection.execute(delete(checkpoint_files).where(here, checkpoint_files.c.path == file.path))
            values = {"digest": digest, "path": file.path, "size": file.size, "sha256": file.sha256}
            connection.execute(insert(checkpoint_files).values(**values, step=file.step, job_id=file.job_id))
        return True

    def forget(self, digest: str, paths: Collection[str]) -> None:
        """Remove files from the index that are deleted or useless."""
        here = checkpoint_files.c.digest == digest
        with transaction(self._engine) as connection:
            connection.execute(delete(checkpoint_files).where(here, checkpoint_files.c.path.in_(paths)))
            left = select(func.coalesce(func.sum(checkpoint_files.c.size), 0)).where(here).scalar_subquery()
            connection.execute(update(checkpoints).where(checkpoints.c.digest == digest).values(size=left))

    def due(self, older_than_s: float) -> list[str]:
        """Prefixes whose last writer has ended and that no job has used for `older_than_s` seconds."""
        job_lives = exists().where(jobs.c.id == checkpoints.c.job_id, jobs.c.state.in_(_LIVE_STATES))
        query = select(checkpoints.c.digest).where(checkpoints.c.used_at < db_now(-older_than_s), ~job_lives)
        with transaction(self._engine, read_only=True) as connection:
            return list(connection.execute(query.limit(_PRUNE_BATCH)).scalars())

    def prune(self, digest: str, older_than_s: float) -> None:
        """Remove a prefix whose files were deleted. If an attempt has begun to use it since, its row stays, but its files are gone."""
        unused = checkpoints.c.used_at < db_now(-older_than_s)
        with transaction(self._engine) as connection:
            connection.execute(delete(checkpoints).where(checkpoints.c.digest == digest, unused))


def _held(lease_id: str | ColumnElement[str]) -> ColumnElement[bool]:
    """Whether the job of the checkpoint still has this lease."""
    return exists().where(jobs.c.id == checkpoints.c.job_id, jobs.c.lease_id == lease_id)
