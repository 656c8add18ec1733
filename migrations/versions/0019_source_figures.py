"""The outputs of sources in storage

Revision ID: 0019
Revises: 0018
"""

import sqlalchemy as sa
from alembic import op

from nightpress.core.database import UtcDateTime

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "source_figures",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("model_digest", sa.String(length=80), nullable=False),
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("outdated", sa.Boolean(), nullable=False),
        sa.Column("measured_at", UtcDateTime(), nullable=False),
        sa.Column("used_at", UtcDateTime(), nullable=False),
        sa.CheckConstraint("size >= 0", name=op.f("ck_source_figures_size")),
        sa.PrimaryKeyConstraint("digest", name="pk_source_figures"),
    )
    op.create_index("ix_source_figures_used_at", "source_figures", ["used_at"])
    op.create_index("ix_source_figures_model", "source_figures", ["tenant_id", "model_digest"])


def downgrade() -> None:
    op.drop_table("source_figures")
