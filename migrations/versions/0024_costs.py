"""What attempts, studies and tenants cost, and budgets

Revision ID: 0024
Revises: 0023
"""

import sqlalchemy as sa
from alembic import op

revision = "0024"
down_revision = "0023"
branch_labels = None
depends_on = None

_NOT_COUNTED = sa.text("cost_micros IS NULL")
_ZERO = sa.text("0")


def upgrade() -> None:
    op.create_table(
        "spending",
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("day", sa.String(length=10), nullable=False),
        sa.Column("micros", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("micros >= 0", name=op.f("ck_spending_micros")),
        sa.PrimaryKeyConstraint("tenant_id", "day", name=op.f("pk_spending")),
    )
    op.add_column("job_attempts", sa.Column("cost_micros", sa.BigInteger(), nullable=True))
    op.create_index(
        "ix_job_attempts_not_counted",
        "job_attempts",
        ["job_id", "number"],
        postgresql_where=_NOT_COUNTED,
        sqlite_where=_NOT_COUNTED,
    )
    op.add_column("tenants", sa.Column("max_cost_day", sa.BigInteger(), nullable=True))
    op.add_column("tenants", sa.Column("max_cost_month", sa.BigInteger(), nullable=True))
    op.add_column("studies", sa.Column("cost_limit", sa.Float(), nullable=True))
    op.add_column("studies", sa.Column("cost_micros", sa.BigInteger(), server_default=_ZERO, nullable=False))
    op.add_column("study_trials", sa.Column("cost_micros", sa.BigInteger(), server_default=_ZERO, nullable=False))


def downgrade() -> None:
    op.drop_column("study_trials", "cost_micros")
    op.drop_column("studies", "cost_micros")
    op.drop_column("studies", "cost_limit")
    op.drop_column("tenants", "max_cost_month")
    op.drop_column("tenants", "max_cost_day")
    op.drop_index("ix_job_attempts_not_counted", "job_attempts")
    op.drop_column("job_attempts", "cost_micros")
    op.drop_table("spending")
