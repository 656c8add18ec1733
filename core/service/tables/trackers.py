"""The tables of trackers: which ones are told of runs, and what each was told of each job and study."""

import sqlalchemy as sa

from nightpress.core.database import UtcDateTime, metadata

trackers = sa.Table(
    "trackers",
    metadata,
    sa.Column("name", sa.String(16), primary_key=True),
    sa.Column("url", sa.String(2048), nullable=False),
    sa.Column("since", UtcDateTime, nullable=False),
)

tracked_runs = sa.Table(
    "tracked_runs",
    metadata,
    sa.Column("tracker", sa.ForeignKey("trackers.name", ondelete="CASCADE"), primary_key=True),
    sa.Column("subject", sa.String(40), primary_key=True),  #: id of a job or a study
    sa.Column("changed", sa.Integer, nullable=False),  #: number of changes of the subject since its run began
    sa.Column("told", sa.Integer, nullable=False),  #: number of these that the tracker knows
    sa.Column("lines", sa.Integer, nullable=False),  #: number of the last log line whose points were sent
    sa.Column("run_id", sa.String(64)),  #: the tracker's id of the run
    sa.Column("page", sa.String(2048)),  #: address of the run's page
    sa.Column("attempts", sa.Integer, nullable=False),  #: since the last success
    sa.Column("next_at", UtcDateTime),  #: NULL: the tracker knows all
    sa.Column("error", sa.Text),  #: why the last attempt failed
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.CheckConstraint("changed >= told AND told >= 0 AND lines >= 0 AND attempts >= 0", name="counters"),
)
_DUE = sa.text("next_at IS NOT NULL")
sa.Index(
    "ix_tracked_runs_due",
    tracked_runs.c.tracker,
    tracked_runs.c.next_at,
    postgresql_where=_DUE,
    sqlite_where=_DUE,
)
