"""Models and data sets may be fetched from a source, and verified after the request

Revision ID: 0007
Revises: 0006
"""

import sqlalchemy as sa
from alembic import op

from nightpress.core.database import UtcDateTime

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_TABLES = ("models", "data_sets")


def upgrade() -> None:
    for table in _TABLES:
        with op.batch_alter_table(table) as batch:
            batch.add_column(sa.Column("source_url", sa.String(length=1024), nullable=True))
            batch.add_column(sa.Column("revision", sa.String(length=100), nullable=True))
            batch.add_column(sa.Column("progress", sa.Float(), server_default=sa.text("0"), nullable=False))
            batch.add_column(sa.Column("claim_id", sa.String(length=40), nullable=True))
            batch.add_column(sa.Column("claim_until", UtcDateTime(), nullable=True))
            for name in ("state", "source"):
                batch.drop_constraint(op.f(f"ck_{table}_{name}"), type_="check")
            states = "state IN ('uploading', 'fetching', 'verifying', 'ready', 'failed')"
            batch.create_check_constraint(op.f(f"ck_{table}_state"), states)
            batch.create_check_constraint(op.f(f"ck_{table}_source"), "source IN ('upload', 'path', 's3', 'hub')")
            fetched = "(source IN ('s3', 'hub')) = (source_url IS NOT NULL)"
            batch.create_check_constraint(op.f(f"ck_{table}_source_url"), fetched)
    op.add_column("schedules", sa.Column("source", sa.String(length=1024), nullable=True))
    op.add_column("schedule_runs", sa.Column("model_id", sa.String(length=40), nullable=True))
    op.add_column("schedule_runs", sa.Column("revision", sa.String(length=100), nullable=True))


def downgrade() -> None:
    """Fetched rows stay, as if they had been uploaded. Rows that are being fetched or verified become failed."""
    op.drop_column("schedule_runs", "revision")
    op.drop_column("schedule_runs", "model_id")
    op.drop_column("schedules", "source")
    for table in _TABLES:
        with op.batch_alter_table(table) as batch:
            for name in ("source_url", "state", "source"):
                batch.drop_constraint(op.f(f"ck_{table}_{name}"), type_="check")
        op.execute(f"UPDATE {table} SET source = 'upload' WHERE source IN ('s3', 'hub')")  # noqa: S608
        op.execute(f"UPDATE {table} SET state = 'failed' WHERE state IN ('fetching', 'verifying')")  # noqa: S608
        with op.batch_alter_table(table) as batch:
            batch.create_check_constraint(op.f(f"ck_{table}_state"), "state IN ('uploading', 'ready', 'failed')")
            batch.create_check_constraint(op.f(f"ck_{table}_source"), "source IN ('upload', 'path')")
            for column in ("claim_until", "claim_id", "progress", "revision", "source_url"):
                batch.drop_column(column)
