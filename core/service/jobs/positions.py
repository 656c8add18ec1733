"""Reads the positions of several jobs in one statement, for all event streams of a process."""

from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import Engine, select

from nightpress.core.database import transaction
from nightpress.core.service.tables.jobs import jobs


class Position(NamedTuple):
    """A job's state, and the numbers of its newest event and its newest log line."""

    state: str
    event_seq: int
    log_seq: int


def read_positions(engine: Engine, job_ids: Sequence[str]) -> dict[str, Position]:
    """The positions of the jobs that exist, in one statement."""
    wanted = select(jobs.c.id, jobs.c.state, jobs.c.event_seq, jobs.c.log_seq).where(jobs.c.id.in_(job_ids))
    with transaction(engine, read_only=True) as connection:
        return {row.id: Position(row.state, row.event_seq, row.log_seq) for row in connection.execute(wanted)}
