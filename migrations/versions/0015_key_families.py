"""A key stores the key that made it, and the family whose limits it shares

Revision ID: 0015
Revises: 0014
"""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("api_keys", sa.Column("made_by", sa.String(length=8), nullable=True))
    op.add_column("api_keys", sa.Column("family", sa.String(length=8), nullable=True))
    op.create_index("ix_api_keys_made_by", "api_keys", ["made_by"])


def downgrade() -> None:
    op.drop_index("ix_api_keys_made_by", table_name="api_keys")
    op.drop_column("api_keys", "family")
    op.drop_column("api_keys", "made_by")
