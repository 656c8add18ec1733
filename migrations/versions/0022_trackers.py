"""Trackers, what each was told of jobs and studies, and webhooks for Slack and e-mail

Revision ID: 0022
Revises: 0021
"""

import sqlalchemy as sa
from alembic import op

from nightpress.core.database import UtcDateTime

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None

_TIME = UtcDateTime()


def upgrade() -> None:
    kind = sa.Column("kind", sa.String(length=12), server_default=sa.text("'standard'"), nullable=False)
    op.add_column("webhooks", kind)
    op.add_column("webhooks", sa.Column("template", sa.Text(), server_default=sa.text("''"), nullable=False))
    op.create_table(
        "trackers",
        sa.Column("name", sa.String(length=16), nullable=False),
        sa.Column("url", sa.String(length=2048), nullable=False),
        sa.Column("since", _TIME, nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_trackers")),
    )
    op.create_table(
        "tracked_runs",
        sa.Column("tracker", sa.String(length=16), nullable=False),
        sa.Column("subject", sa.String(length=40), nullable=False),
        sa.Column("changed", sa.Integer(), nullable=False),
        sa.Column("told", sa.Integer(), nullable=False),
        sa.Column("lines", sa.Integer(), nullable=False),
        sa.Column("run_id", sa.String(length=64), nullable=True),
        sa.Column("page", sa.String(length=2048), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("next_at", _TIME, nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("created_at", _TIME, nullable=False),
        sa.CheckConstraint(
            "changed >= told AND told >= 0 AND lines >= 0 AND attempts >= 0", name=op.f("ck_tracked_runs_counters")
        ),
        sa.ForeignKeyConstraint(
            ["tracker"], ["trackers.name"], name=op.f("fk_tracked_runs_tracker_trackers"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("tracker", "subject", name=op.f("pk_tracked_runs")),
    )
    due = sa.text("next_at IS NOT NULL")
    op.create_index(
        "ix_tracked_runs_due", "tracked_runs", ["tracker", "next_at"], postgresql_where=due, sqlite_where=due
    )


def downgrade() -> None:
    op.drop_table("tracked_runs")
    op.drop_table("trackers")
    op.drop_column("webhooks", "template")
    op.drop_column("webhooks", "kind")
