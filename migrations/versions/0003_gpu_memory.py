"""Workers report how much of their GPU's memory is in use

Revision ID: 0003
Revises: 0002
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("workers") as table:
        table.add_column(sa.Column("gpu_memory", sa.BigInteger(), nullable=True))
        table.add_column(sa.Column("gpu_memory_used", sa.BigInteger(), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("workers") as table:
        table.drop_column("gpu_memory_used")
        table.drop_column("gpu_memory")
