"""Notes that a job or a study has changed, in the transaction of the change. The control process then tells the trackers."""

from functools import cache

from sqlalchemy import ColumnElement, Executable, bindparam, case, literal_column, null, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from nightpress.core.database import db_now
from nightpress.core.service.tables.trackers import tracked_runs, trackers

_COLUMNS = ("tracker", "subject", "changed", "told", "lines", "run_id", "attempts", "next_at", "created_at")


def note_for_trackers(connection: Connection, subject: str) -> None:
    """Note a change of a job or study for every tracker. Without trackers, nothing is written."""
    connection.execute(_noted(connection.dialect.name), {"subject": subject})


@cache
def _noted(dialect: str) -> Executable:
    """A row that is being told, or that waits after a failure, keeps its time: the courier sees `changed` when it settles the row."""
    zero: ColumnElement[int] = literal_column("0")
    subject = bindparam("subject", type_=tracked_runs.c.subject.type)
    new = select(trackers.c.name, subject, literal_column("1"), zero, zero, null(), zero, db_now(), db_now()).where(
        literal_column("1 = 1")
    )  # SQLite's grammar needs a WHERE before ON CONFLICT
    build = postgresql.insert if dialect == "postgresql" else sqlite.insert
    rests = tracked_runs.c.attempts == zero
    again = {
        "changed": tracked_runs.c.changed + literal_column("1"),
        "next_at": case((rests, db_now()), else_=tracked_runs.c.next_at),
    }
    insert = build(tracked_runs).from_select(_COLUMNS, new)
    return insert.on_conflict_do_update(index_elements=["tracker", "subject"], set_=again)
