"""Deleted and failed rows record whether their files were swept

Revision ID: 0012
Revises: 0011
"""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

_UNSWEPT = "NOT swept AND (deleted_at IS NOT NULL OR state = 'failed')"


def upgrade() -> None:
    where = sa.text(_UNSWEPT)
    for table in ("models", "data_sets"):
        op.add_column(table, sa.Column("swept", sa.Boolean(), server_default=sa.text("false"), nullable=False))
        op.create_index(f"ix_{table}_unswept", table, ["id"], postgresql_where=where, sqlite_where=where)


def downgrade() -> None:
    for table in ("models", "data_sets"):
        op.drop_index(f"ix_{table}_unswept", table_name=table)
        op.drop_column(table, "swept")
