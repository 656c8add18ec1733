"""Several GPUs of a host: what jobs need, what attempts hold, and what workers offer

Revision ID: 0025
Revises: 0024
"""

import sqlalchemy as sa
from alembic import op

from nightpress.core.database import JsonType, UtcDateTime

revision = "0025"
down_revision = "0024"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("needs_gpus", sa.Integer(), server_default=sa.text("1"), nullable=False))
    op.add_column("jobs", sa.Column("held_by", sa.String(length=80), nullable=True))
    op.add_column("jobs", sa.Column("held_until", UtcDateTime(), nullable=True))
    _claim_index(["run_after", "needs_memory", "needs_gpu_memory", "needs_gpus"])
    op.add_column("job_attempts", sa.Column("gpus", JsonType, nullable=True))
    op.add_column("job_attempts", sa.Column("memory_limit", sa.BigInteger(), nullable=True))
    op.add_column("workers", sa.Column("gpus", JsonType, nullable=True))
    op.add_column("workers", sa.Column("gpu_kinds", JsonType, nullable=True))
    op.add_column("workers", sa.Column("cpu_jobs", sa.Integer(), server_default=sa.text("0"), nullable=False))


def downgrade() -> None:
    op.drop_column("workers", "cpu_jobs")
    op.drop_column("workers", "gpu_kinds")
    op.drop_column("workers", "gpus")
    op.drop_column("job_attempts", "memory_limit")
    op.drop_column("job_attempts", "gpus")
    _claim_index(["run_after", "needs_memory", "needs_gpu_memory"])
    op.drop_column("jobs", "held_until")
    op.drop_column("jobs", "held_by")
    op.drop_column("jobs", "needs_gpus")


def _claim_index(include: list[str]) -> None:
    where = sa.text("state = 'queued'")
    columns: list[str | sa.TextClause] = ["queue", "tenant_id", sa.text("priority DESC"), "created_at", "id"]
    op.drop_index("ix_jobs_claim", table_name="jobs")
    op.create_index(
        "ix_jobs_claim", "jobs", columns, postgresql_include=include, postgresql_where=where, sqlite_where=where
    )
