"""Studies, their trials and events

Revision ID: 0018
Revises: 0017
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from nightpress.core.database import UtcDateTime

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None

_JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")
_ACTIVE, _OPEN = sa.text("finished_at IS NULL"), sa.text("state = 'open'")


def upgrade() -> None:
    op.create_table(
        "studies",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("state", sa.String(length=12), nullable=False),
        sa.Column("reason", sa.String(length=16), nullable=True),
        sa.Column("verdict", sa.String(length=12), nullable=True),
        sa.Column("model_id", sa.String(length=40), nullable=False),
        sa.Column("model_name", sa.String(length=64), nullable=False),
        sa.Column("model_digest", sa.String(length=80), nullable=False),
        sa.Column("minimize", sa.String(length=16), nullable=False),
        sa.Column("gates", _JSON, nullable=False),
        sa.Column("target", sa.String(length=16), nullable=True),
        sa.Column("space", _JSON, nullable=False),
        sa.Column("automatic", sa.Boolean(), nullable=False),
        sa.Column("starts", _JSON, nullable=False),
        sa.Column("seed", sa.Integer(), nullable=False),
        sa.Column("parallel", sa.Integer(), nullable=False),
        sa.Column("max_trials", sa.Integer(), nullable=False),
        sa.Column("max_judged", sa.Integer(), nullable=False),
        sa.Column("cpu_limit_s", sa.Float(), nullable=True),
        sa.Column("gpu_limit_s", sa.Float(), nullable=True),
        sa.Column("deadline_at", UtcDateTime(), nullable=False),
        sa.Column("priority", sa.SmallInteger(), nullable=False),
        sa.Column("labels", _JSON, nullable=False),
        sa.Column("promote", sa.Boolean(), nullable=False),
        sa.Column("created_by", sa.String(length=8), nullable=True),
        sa.Column("proposed", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("told", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("cpu_s", sa.Float(), server_default=sa.text("0"), nullable=False),
        sa.Column("gpu_s", sa.Float(), server_default=sa.text("0"), nullable=False),
        sa.Column("winner", sa.Integer(), nullable=True),
        sa.Column("report", _JSON, nullable=True),
        sa.Column("error", _JSON, nullable=True),
        sa.Column("event_seq", sa.Integer(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("finished_at", UtcDateTime(), nullable=True),
        sa.CheckConstraint("(state = 'failed') = (error IS NOT NULL)", name=op.f("ck_studies_error")),
        sa.CheckConstraint("(state = 'succeeded') = (verdict IS NOT NULL)", name=op.f("ck_studies_verdict")),
        sa.CheckConstraint(
            "(state IN ('succeeded','failed','cancelled')) = (finished_at IS NOT NULL)",
            name=op.f("ck_studies_finished"),
        ),
        sa.CheckConstraint("minimize IN ('size','latency','decode','memory')", name=op.f("ck_studies_minimize")),
        sa.CheckConstraint(
            "state IN ('searching','judging','cancelling','succeeded','failed','cancelled')",
            name=op.f("ck_studies_state"),
        ),
        sa.CheckConstraint("verdict IN ('accepted','rejected')", name=op.f("ck_studies_verdict_value")),
        sa.CheckConstraint("told >= 0 AND told <= proposed AND event_seq >= 1", name=op.f("ck_studies_counters")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_studies")),
    )
    op.create_index("ix_studies_active", "studies", ["id"], postgresql_where=_ACTIVE, sqlite_where=_ACTIVE)
    op.create_index("ix_studies_listing", "studies", ["tenant_id", "created_at", "id"])
    op.create_table(
        "study_events",
        sa.Column("study_id", sa.String(length=40), nullable=False),
        sa.Column("seq", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("at", UtcDateTime(), nullable=False),
        sa.Column("kind", sa.String(length=40), nullable=False),
        sa.Column("data", _JSON, nullable=False),
        sa.CheckConstraint("seq >= 1", name=op.f("ck_study_events_seq")),
        sa.ForeignKeyConstraint(
            ["study_id"], ["studies.id"], name=op.f("fk_study_events_study_id_studies"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("study_id", "seq", name=op.f("pk_study_events")),
    )
    op.create_table(
        "study_trials",
        sa.Column("study_id", sa.String(length=40), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("role", sa.String(length=8), nullable=False),
        sa.Column("judges", sa.Integer(), nullable=True),
        sa.Column("params", _JSON, nullable=False),
        sa.Column("known", sa.Integer(), nullable=False),
        sa.Column("recipe", _JSON, nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("job_id", sa.String(length=40), nullable=True),
        sa.Column("state", sa.String(length=12), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("artifact", sa.String(length=200), nullable=True),
        sa.Column("goal", sa.Float(), nullable=True),
        sa.Column("goal_low", sa.Float(), nullable=True),
        sa.Column("goal_high", sa.Float(), nullable=True),
        sa.Column("gates", _JSON, nullable=True),
        sa.Column("margin", sa.Float(), nullable=True),
        sa.Column("cpu_s", sa.Float(), server_default=sa.text("0"), nullable=False),
        sa.Column("gpu_s", sa.Float(), server_default=sa.text("0"), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("ended_at", UtcDateTime(), nullable=True),
        sa.CheckConstraint("(role = 'judge') = (judges IS NOT NULL)", name=op.f("ck_study_trials_judges")),
        sa.CheckConstraint("(state = 'open') = (ended_at IS NULL)", name=op.f("ck_study_trials_ended")),
        sa.CheckConstraint("role IN ('search','judge')", name=op.f("ck_study_trials_role")),
        sa.CheckConstraint(
            "state IN ('open','kept','missed','screened','failed','cancelled','refused')",
            name=op.f("ck_study_trials_state"),
        ),
        sa.CheckConstraint("number >= 0 AND known >= 0", name=op.f("ck_study_trials_numbers")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_study_trials_job_id_jobs"), ondelete="SET NULL"),
        sa.ForeignKeyConstraint(
            ["study_id"], ["studies.id"], name=op.f("fk_study_trials_study_id_studies"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("study_id", "number", name=op.f("pk_study_trials")),
        sa.UniqueConstraint("study_id", "role", "digest", name=op.f("uq_study_trials_study_id_role_digest")),
    )
    op.create_index("ix_study_trials_job_id", "study_trials", ["job_id"])
    op.create_index("ix_study_trials_open", "study_trials", ["study_id"], postgresql_where=_OPEN, sqlite_where=_OPEN)
    op.add_column("jobs", sa.Column("study_id", sa.String(length=40), nullable=True))
    op.add_column("schedules", sa.Column("study", _JSON, nullable=True))
    op.add_column("schedule_runs", sa.Column("study_id", sa.String(length=40), nullable=True))


def downgrade() -> None:
    op.drop_column("schedule_runs", "study_id")
    op.execute("DELETE FROM schedules WHERE study IS NOT NULL")
    op.drop_column("schedules", "study")
    op.drop_column("jobs", "study_id")
    op.drop_table("study_trials")
    op.drop_table("study_events")
    op.drop_table("studies")
