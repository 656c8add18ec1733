"""The tables of studies, their trials and their events. The constraints make sure that no trial is proposed twice."""

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    SmallInteger,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

from nightpress.core.database import JsonType, UtcDateTime, metadata

studies = Table(
    "studies",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("tenant_id", String(64), nullable=False),
    Column("name", String(200), nullable=False),
    Column("state", String(12), nullable=False),
    Column("reason", String(16)),  #: why the search ended
    Column("verdict", String(12)),
    # No foreign key: a study's report outlives its model.
    Column("model_id", String(40), nullable=False),
    Column("model_name", String(64), nullable=False),
    Column("model_digest", String(80), nullable=False),
    Column("minimize", String(16), nullable=False),
    Column("gates", JsonType, nullable=False),
    Column("target", String(16)),
    Column("space", JsonType, nullable=False),  #: recipes with choices and ranges, as they were resolved when it began
    Column("automatic", Boolean, nullable=False),  #: whether the space was made from the model
    Column("starts", JsonType, nullable=False),  #: parameters of the first trials
    Column("seed", Integer, nullable=False),
    Column("parallel", Integer, nullable=False),
    Column("max_trials", Integer, nullable=False),
    Column("max_judged", Integer, nullable=False),
    Column("cpu_limit_s", Float),  #: worker-seconds on the queue `cpu` after which the search ends
    Column("gpu_limit_s", Float),
    Column("cost_limit", Float),  #: in the operator's currency
    Column("deadline_at", UtcDateTime, nullable=False),
    Column("priority", SmallInteger, nullable=False),
    Column("labels", JsonType, nullable=False),
    Column("promote", Boolean, nullable=False),
    Column("created_by", String(8)),
    Column("proposed", Integer, nullable=False, server_default=text("0")),  #: number of trials; the next trial's number
    Column("told", Integer, nullable=False, server_default=text("0")),  #: number of trials that have ended
    Column("cpu_s", Float, nullable=False, server_default=text("0")),  #: worker-seconds of the trials that have ended
    Column("gpu_s", Float, nullable=False, server_default=text("0")),
    Column("cost_micros", BigInteger, nullable=False, server_default=text("0")),
    Column("winner", Integer),  #: number of the winner's last measurement
    Column("report", JsonType),
    Column("error", JsonType),
    Column("event_seq", Integer, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("finished_at", UtcDateTime),
    CheckConstraint("state IN ('searching','judging','cancelling','succeeded','failed','cancelled')", name="state"),
    CheckConstraint("(state IN ('succeeded','failed','cancelled')) = (finished_at IS NOT NULL)", name="finished"),
    CheckConstraint("(state = 'succeeded') = (verdict IS NOT NULL)", name="verdict"),
    CheckConstraint("verdict IN ('accepted','rejected')", name="verdict_value"),
    CheckConstraint("(state = 'failed') = (error IS NOT NULL)", name="error"),
    CheckConstraint("minimize IN ('size','latency','decode','memory')", name="minimize"),
    CheckConstraint("told >= 0 AND told <= proposed AND event_seq >= 1", name="counters"),
    Index("ix_studies_listing", "tenant_id", "created_at", "id"),
)
_ACTIVE = text("finished_at IS NULL")
Index("ix_studies_active", studies.c.id, postgresql_where=_ACTIVE, sqlite_where=_ACTIVE)

study_trials = Table(
    "study_trials",
    metadata,
    Column("study_id", ForeignKey("studies.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("role", String(8), nullable=False),
    Column("judges", Integer),  #: number of the trial whose recipe is measured again
    Column("params", JsonType, nullable=False),  #: path in the space → chosen value
    Column("known", Integer, nullable=False),  #: the proposal was made from the results of this many first trials
    Column("recipe", JsonType, nullable=False),
    Column("digest", String(64), nullable=False),  #: of the recipe's passes, calibration and exports
    Column("job_id", ForeignKey("jobs.id", ondelete="SET NULL"), index=True),
    Column("state", String(12), nullable=False),
    Column("reason", Text),  #: why it ended so, for users
    Column("artifact", String(200)),  #: the artifact that the figures are of
    Column("goal", Float),  #: what is minimized, as a share of the source's
    Column("goal_low", Float),
    Column("goal_high", Float),
    Column("gates", JsonType),  #: how far each gate was missed or kept
    Column("margin", Float),  #: the largest of these: above 0 if a gate was missed
    Column("cpu_s", Float, nullable=False, server_default=text("0")),
    Column("gpu_s", Float, nullable=False, server_default=text("0")),
    Column("cost_micros", BigInteger, nullable=False, server_default=text("0")),
    Column("created_at", UtcDateTime, nullable=False),
    Column("ended_at", UtcDateTime),
    CheckConstraint("role IN ('search','judge')", name="role"),
    CheckConstraint("(role = 'judge') = (judges IS NOT NULL)", name="judges"),
    CheckConstraint("state IN ('open','kept','missed','screened','failed','cancelled','refused')", name="state"),
    CheckConstraint("(state = 'open') = (ended_at IS NULL)", name="ended"),
    CheckConstraint("number >= 0 AND known >= 0", name="numbers"),
    UniqueConstraint("study_id", "role", "digest"),
)
_OPEN = text("state = 'open'")
Index("ix_study_trials_open", study_trials.c.study_id, postgresql_where=_OPEN, sqlite_where=_OPEN)

study_events = Table(
    "study_events",
    metadata,
    Column("study_id", ForeignKey("studies.id", ondelete="CASCADE"), primary_key=True),
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("at", UtcDateTime, nullable=False),
    Column("kind", String(40), nullable=False),
    Column("data", JsonType, nullable=False),
    CheckConstraint("seq >= 1", name="seq"),
)
