"""A model names the files beside it that were not taken

Revision ID: 0017
Revises: 0016
"""

import sqlalchemy as sa
from alembic import op

from nightpress.core.database import JsonType

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("models", sa.Column("left_out", JsonType, nullable=True))


def downgrade() -> None:
    op.drop_column("models", "left_out")
