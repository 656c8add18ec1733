"""A job stores why it is in its queue and how much GPU memory it needs; the fleet remembers workers that have stopped

Revision ID: 0014
Revises: 0013
"""

import sqlalchemy as sa
from alembic import op

from nightpress.core.database import UtcDateTime

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("queue_reason", sa.Text(), server_default=sa.text("''"), nullable=False))
    op.add_column("jobs", sa.Column("needs_gpu_memory", sa.BigInteger(), server_default=sa.text("0"), nullable=False))
    op.add_column("workers", sa.Column("left_at", UtcDateTime()))
    _claim_index(["run_after", "needs_memory", "needs_gpu_memory"])


def downgrade() -> None:
    _claim_index(["run_after", "needs_memory"])
    op.execute("DELETE FROM workers WHERE left_at IS NOT NULL")
    op.drop_column("workers", "left_at")
    op.drop_column("jobs", "needs_gpu_memory")
    op.drop_column("jobs", "queue_reason")


def _claim_index(include: list[str]) -> None:
    where = sa.text("state = 'queued'")
    columns: list[str | sa.TextClause] = ["queue", "tenant_id", sa.text("priority DESC"), "created_at", "id"]
    op.drop_index("ix_jobs_claim", table_name="jobs")
    op.create_index(
        "ix_jobs_claim", "jobs", columns, postgresql_include=include, postgresql_where=where, sqlite_where=where
    )
