"""The tables of studies, their trials and their events. The constraints make sure that no trial is proposed twice."""

import sqlalchemy as sa

from nightpress.core.database import JsonType, UtcDateTime, metadata

studies = sa.Table(
    "studies",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("tenant_id", sa.String(64), nullable=False),
    sa.Column("name", sa.String(200), nullable=False),
    sa.Column("state", sa.String(12), nullable=False),
    sa.Column("reason", sa.String(16)),  #: why the search ended
    sa.Column("verdict", sa.String(12)),
    # No foreign key: a study's report outlives its model.
    sa.Column("model_id", sa.String(40), nullable=False),
    sa.Column("model_name", sa.String(64), nullable=False),
    sa.Column("model_digest", sa.String(80), nullable=False),
    sa.Column("minimize", sa.String(16), nullable=False),
    sa.Column("gates", JsonType, nullable=False),
    sa.Column("target", sa.String(16)),
    sa.Column(
        "space", JsonType, nullable=False
    ),  #: recipes with choices and ranges, as they were resolved when it began
    sa.Column("automatic", sa.Boolean, nullable=False),  #: whether the space was made from the model
    sa.Column("starts", JsonType, nullable=False),  #: parameters of the first trials
    sa.Column("seed", sa.Integer, nullable=False),
    sa.Column("parallel", sa.Integer, nullable=False),
    sa.Column("max_trials", sa.Integer, nullable=False),
    sa.Column("max_judged", sa.Integer, nullable=False),
    sa.Column("cpu_limit_s", sa.Float),  #: worker-seconds on the queue `cpu` after which the search ends
    sa.Column("gpu_limit_s", sa.Float),
    sa.Column("cost_limit", sa.Float),  #: in the operator's currency
    sa.Column("deadline_at", UtcDateTime, nullable=False),
    sa.Column("priority", sa.SmallInteger, nullable=False),
    sa.Column("labels", JsonType, nullable=False),
    sa.Column("promote", sa.Boolean, nullable=False),
    sa.Column("created_by", sa.String(8)),
    sa.Column(
        "proposed", sa.Integer, nullable=False, server_default=sa.text("0")
    ),  #: number of trials; the next trial's number
    sa.Column("told", sa.Integer, nullable=False, server_default=sa.text("0")),  #: number of trials that have ended
    sa.Column(
        "cpu_s", sa.Float, nullable=False, server_default=sa.text("0")
    ),  #: worker-seconds of the trials that have ended
    sa.Column("gpu_s", sa.Float, nullable=False, server_default=sa.text("0")),
    sa.Column("cost_micros", sa.BigInteger, nullable=False, server_default=sa.text("0")),
    sa.Column("winner", sa.Integer),  #: number of the winner's last measurement
    sa.Column("report", JsonType),
    sa.Column("error", JsonType),
    sa.Column("event_seq", sa.Integer, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("finished_at", UtcDateTime),
    sa.CheckConstraint("state IN ('searching','judging','cancelling','succeeded','failed','cancelled')", name="state"),
    sa.CheckConstraint("(state IN ('succeeded','failed','cancelled')) = (finished_at IS NOT NULL)", name="finished"),
    sa.CheckConstraint("(state = 'succeeded') = (verdict IS NOT NULL)", name="verdict"),
    sa.CheckConstraint("verdict IN ('accepted','rejected')", name="verdict_value"),
    sa.CheckConstraint("(state = 'failed') = (error IS NOT NULL)", name="error"),
    sa.CheckConstraint("minimize IN ('size','latency','decode','memory')", name="minimize"),
    sa.CheckConstraint("told >= 0 AND told <= proposed AND event_seq >= 1", name="counters"),
    sa.Index("ix_studies_listing", "tenant_id", "created_at", "id"),
)
_ACTIVE = sa.text("finished_at IS NULL")
sa.Index("ix_studies_active", studies.c.id, postgresql_where=_ACTIVE, sqlite_where=_ACTIVE)

study_trials = sa.Table(
    "study_trials",
    metadata,
    sa.Column("study_id", sa.ForeignKey("studies.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("role", sa.String(8), nullable=False),
    sa.Column("judges", sa.Integer),  #: number of the trial whose recipe is measured again
    sa.Column("params", JsonType, nullable=False),  #: path in the space → chosen value
    sa.Column("known", sa.Integer, nullable=False),  #: the proposal was made from the results of this many first trials
    sa.Column("recipe", JsonType, nullable=False),
    sa.Column("digest", sa.String(64), nullable=False),  #: of the recipe's passes, calibration and exports
    sa.Column("job_id", sa.ForeignKey("jobs.id", ondelete="SET NULL"), index=True),
    sa.Column("state", sa.String(12), nullable=False),
    sa.Column("reason", sa.Text),  #: why it ended so, for users
    sa.Column("artifact", sa.String(200)),  #: the artifact that the figures are of
    sa.Column("goal", sa.Float),  #: what is minimized, as a share of the source's
    sa.Column("goal_low", sa.Float),
    sa.Column("goal_high", sa.Float),
    sa.Column("gates", JsonType),  #: how far each gate was missed or kept
    sa.Column("margin", sa.Float),  #: the largest of these: above 0 if a gate was missed
    sa.Column("cpu_s", sa.Float, nullable=False, server_default=sa.text("0")),
    sa.Column("gpu_s", sa.Float, nullable=False, server_default=sa.text("0")),
    sa.Column("cost_micros", sa.BigInteger, nullable=False, server_default=sa.text("0")),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("ended_at", UtcDateTime),
    sa.CheckConstraint("role IN ('search','judge')", name="role"),
    sa.CheckConstraint("(role = 'judge') = (judges IS NOT NULL)", name="judges"),
    sa.CheckConstraint("state IN ('open','kept','missed','screened','failed','cancelled','refused')", name="state"),
    sa.CheckConstraint("(state = 'open') = (ended_at IS NULL)", name="ended"),
    sa.CheckConstraint("number >= 0 AND known >= 0", name="numbers"),
    sa.UniqueConstraint("study_id", "role", "digest"),
)
_OPEN = sa.text("state = 'open'")
sa.Index("ix_study_trials_open", study_trials.c.study_id, postgresql_where=_OPEN, sqlite_where=_OPEN)

study_events = sa.Table(
    "study_events",
    metadata,
    sa.Column("study_id", sa.ForeignKey("studies.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("at", UtcDateTime, nullable=False),
    sa.Column("kind", sa.String(40), nullable=False),
    sa.Column("data", JsonType, nullable=False),
    sa.CheckConstraint("seq >= 1", name="seq"),
)
