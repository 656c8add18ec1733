"""The tables of trackers: which ones are told of runs, and what each was told of each job and study."""

from sqlalchemy import CheckConstraint, Column, ForeignKey, Index, Integer, String, Table, Text, text

from nightpress.core.database import UtcDateTime, metadata

trackers = Table(
    "trackers",
    metadata,
    Column("name", String(16), primary_key=True),
    Column("url", String(2048), nullable=False),
    Column("since", UtcDateTime, nullable=False),
)

tracked_runs = Table(
    "tracked_runs",
    metadata,
    Column("tracker", ForeignKey("trackers.name", ondelete="CASCADE"), primary_key=True),
    Column("subject", String(40), primary_key=True),  #: id of a job or a study
    Column("changed", Integer, nullable=False),  #: number of changes of the subject since its run began
    Column("told", Integer, nullable=False),  #: number of these that the tracker knows
    Column("lines", Integer, nullable=False),  #: number of the last log line whose points were sent
    Column("run_id", String(64)),  #: the tracker's id of the run
    Column("page", String(2048)),  #: address of the run's page
    Column("attempts", Integer, nullable=False),  #: since the last success
    Column("next_at", UtcDateTime),  #: NULL: the tracker knows all
    Column("error", Text),  #: why the last attempt failed
    Column("created_at", UtcDateTime, nullable=False),
    CheckConstraint("changed >= told AND told >= 0 AND lines >= 0 AND attempts >= 0", name="counters"),
)
_DUE = text("next_at IS NOT NULL")
Index(
    "ix_tracked_runs_due",
    tracked_runs.c.tracker,
    tracked_runs.c.next_at,
    postgresql_where=_DUE,
    sqlite_where=_DUE,
)
