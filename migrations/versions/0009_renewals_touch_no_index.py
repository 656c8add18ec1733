"""A renewal of a lease updates no index

Revision ID: 0009
Revises: 0008
"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    _index(["tenant_id"], "lease_id IS NOT NULL")
    if op.get_bind().dialect.name == "postgresql":
        op.execute("ALTER TABLE jobs SET (fillfactor = 90)")


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.execute("ALTER TABLE jobs RESET (fillfactor)")
    _index(["tenant_id", "lease_expires_at"], "lease_expires_at IS NOT NULL")


def _index(columns: list[str], condition: str) -> None:
    where = sa.text(condition)
    op.drop_index("ix_jobs_leased", table_name="jobs")
    op.create_index("ix_jobs_leased", "jobs", columns, postgresql_where=where, sqlite_where=where)
