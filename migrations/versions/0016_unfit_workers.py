"""A worker reports why it is unfit

Revision ID: 0016
Revises: 0015
"""

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("workers", sa.Column("unfit", sa.String(length=1000), nullable=True))


def downgrade() -> None:
    op.drop_column("workers", "unfit")
