"""The tables of schedules and their runs. The unique constraint makes sure that a fire is recorded once."""

from sqlalchemy import (
    Boolean,
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    Integer,
    String,
    Table,
    UniqueConstraint,
    text,
)

from nightpress.core.database import JsonType, UtcDateTime, metadata

schedules = Table(
    "schedules",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("tenant_id", String(64), nullable=False),
    Column("name", String(64), nullable=False),
    Column("cron", String(200), nullable=False),
    Column("timezone", String(64), nullable=False),
    Column("overlap", String(8), nullable=False),
    Column("catch_up", String(8), nullable=False),
    Column("only_if_changed", Boolean, nullable=False),
    Column("suspended", Boolean, nullable=False),
    Column("job", JsonType, nullable=False),  #: core.wire.jobs.JobRequest
    Column("study", JsonType),  #: core.wire.studies.StudyRequest; then a fire starts a study in place of the job
    Column("source", String(1024)),  #: the source that each fire reads the model from
    Column("version", Integer, nullable=False),  #: number of edits; serves as the ETag
    #: the next fire that is not recorded yet; NULL while suspended
    Column("next_at", UtcDateTime),
    Column("created_by", String(8)),
    Column("created_at", UtcDateTime, nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
    CheckConstraint("overlap IN ('skip','queue','replace')", name="overlap"),
    CheckConstraint("catch_up IN ('none','latest','all')", name="catch_up"),
    CheckConstraint("NOT (suspended AND next_at IS NOT NULL)", name="suspended"),
    CheckConstraint("version >= 1", name="version"),
    UniqueConstraint("tenant_id", "name"),
)
_NEXT = text("next_at IS NOT NULL")
Index("ix_schedules_next_at", schedules.c.next_at, postgresql_where=_NEXT, sqlite_where=_NEXT)

schedule_runs = Table(
    "schedule_runs",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("schedule_id", ForeignKey("schedules.id", ondelete="CASCADE"), nullable=False),
    Column("scheduled_for", UtcDateTime, nullable=False),
    Column("cause", String(8), nullable=False),
    Column("state", String(12), nullable=False),
    Column("reason", String(16)),  #: why it was skipped
    Column("error", JsonType),
    Column("job_id", ForeignKey("jobs.id", ondelete="SET NULL"), index=True),
    Column("study_id", String(40)),  #: the study that it started
    Column("model_id", String(40)),  #: the model that was fetched for it, if the schedule has a source
    Column("revision", String(100)),  #: of the source
    Column("digest", String(80)),  #: of the job's model
    Column("fingerprint", String(64)),  #: the job's fingerprint
    Column("created_at", UtcDateTime, nullable=False),
    CheckConstraint("cause IN ('cron','manual')", name="cause"),
    CheckConstraint("state IN ('pending','submitted','skipped','failed')", name="state"),
    CheckConstraint("reason IN ('overlap','unchanged','missed','replaced')", name="reason"),
    CheckConstraint("(state = 'skipped') = (reason IS NOT NULL)", name="skipped"),
    CheckConstraint("(state = 'failed') = (error IS NOT NULL)", name="failed"),
    UniqueConstraint("schedule_id", "scheduled_for"),
    Index("ix_schedule_runs_listing", "schedule_id", "created_at", "id"),
)
_PENDING = text("state = 'pending'")
Index("ix_schedule_runs_pending", schedule_runs.c.id, postgresql_where=_PENDING, sqlite_where=_PENDING)
