"""The tables of schedules and their runs. The unique constraint makes sure that a fire is recorded once."""

import sqlalchemy as sa

from nightpress.core.database import JsonType, UtcDateTime, metadata

schedules = sa.Table(
    "schedules",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("tenant_id", sa.String(64), nullable=False),
    sa.Column("name", sa.String(64), nullable=False),
    sa.Column("cron", sa.String(200), nullable=False),
    sa.Column("timezone", sa.String(64), nullable=False),
    sa.Column("overlap", sa.String(8), nullable=False),
    sa.Column("catch_up", sa.String(8), nullable=False),
    sa.Column("only_if_changed", sa.Boolean, nullable=False),
    sa.Column("suspended", sa.Boolean, nullable=False),
    sa.Column("job", JsonType, nullable=False),  #: core.wire.jobs.JobRequest
    sa.Column("study", JsonType),  #: core.wire.studies.StudyRequest; then a fire starts a study in place of the job
    sa.Column("source", sa.String(1024)),  #: the source that each fire reads the model from
    sa.Column("version", sa.Integer, nullable=False),  #: number of edits; serves as the ETag
    #: the next fire that is not recorded yet; NULL while suspended
    sa.Column("next_at", UtcDateTime),
    sa.Column("created_by", sa.String(8)),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("updated_at", UtcDateTime, nullable=False),
    sa.CheckConstraint("overlap IN ('skip','queue','replace')", name="overlap"),
    sa.CheckConstraint("catch_up IN ('none','latest','all')", name="catch_up"),
    sa.CheckConstraint("NOT (suspended AND next_at IS NOT NULL)", name="suspended"),
    sa.CheckConstraint("version >= 1", name="version"),
    sa.UniqueConstraint("tenant_id", "name"),
)
_NEXT = sa.text("next_at IS NOT NULL")
sa.Index("ix_schedules_next_at", schedules.c.next_at, postgresql_where=_NEXT, sqlite_where=_NEXT)

schedule_runs = sa.Table(
    "schedule_runs",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("schedule_id", sa.ForeignKey("schedules.id", ondelete="CASCADE"), nullable=False),
    sa.Column("scheduled_for", UtcDateTime, nullable=False),
    sa.Column("cause", sa.String(8), nullable=False),
    sa.Column("state", sa.String(12), nullable=False),
    sa.Column("reason", sa.String(16)),  #: why it was skipped
    sa.Column("error", JsonType),
    sa.Column("job_id", sa.ForeignKey("jobs.id", ondelete="SET NULL"), index=True),
    sa.Column("study_id", sa.String(40)),  #: the study that it started
    sa.Column("model_id", sa.String(40)),  #: the model that was fetched for it, if the schedule has a source
    sa.Column("revision", sa.String(100)),  #: of the source
    sa.Column("digest", sa.String(80)),  #: of the job's model
    sa.Column("fingerprint", sa.String(64)),  #: the job's fingerprint
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.CheckConstraint("cause IN ('cron','manual')", name="cause"),
    sa.CheckConstraint("state IN ('pending','submitted','skipped','failed')", name="state"),
    sa.CheckConstraint("reason IN ('overlap','unchanged','missed','replaced')", name="reason"),
    sa.CheckConstraint("(state = 'skipped') = (reason IS NOT NULL)", name="skipped"),
    sa.CheckConstraint("(state = 'failed') = (error IS NOT NULL)", name="failed"),
    sa.UniqueConstraint("schedule_id", "scheduled_for"),
    sa.Index("ix_schedule_runs_listing", "schedule_id", "created_at", "id"),
)
_PENDING = sa.text("state = 'pending'")
sa.Index("ix_schedule_runs_pending", schedule_runs.c.id, postgresql_where=_PENDING, sqlite_where=_PENDING)
