"""A job may reuse the result of an identical job

Revision ID: 0005
Revises: 0004
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("fingerprint", sa.String(length=64), nullable=True))
    op.add_column("jobs", sa.Column("reused_from", sa.String(length=40), nullable=True))
    reusable = sa.text("state = 'succeeded' AND reused_from IS NULL")
    columns = ["tenant_id", "fingerprint", "finished_at"]
    op.create_index("ix_jobs_reusable", "jobs", columns, postgresql_where=reusable, sqlite_where=reusable)
    reused = sa.text("reused_from IS NOT NULL")
    op.create_index("ix_jobs_reused", "jobs", ["reused_from"], postgresql_where=reused, sqlite_where=reused)


def downgrade() -> None:
    op.drop_index("ix_jobs_reused", table_name="jobs")
    op.drop_index("ix_jobs_reusable", table_name="jobs")
    op.drop_column("jobs", "reused_from")
    op.drop_column("jobs", "fingerprint")
