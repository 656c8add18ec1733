"""Checkpoints in storage

Revision ID: 0002
Revises: 0001
"""

import sqlalchemy as sa
from alembic import op

from nightpress.core.database import UtcDateTime

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "checkpoints",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("lease_id", sa.String(length=40), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("used_at", UtcDateTime(), nullable=False),
        sa.CheckConstraint("size >= 0", name=op.f("ck_checkpoints_size")),
        sa.PrimaryKeyConstraint("digest", name="pk_checkpoints"),
    )
    op.create_index("ix_checkpoints_used_at", "checkpoints", ["used_at"])
    op.create_table(
        "checkpoint_files",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("path", sa.String(length=512), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.ForeignKeyConstraint(
            ["digest"], ["checkpoints.digest"], name="fk_checkpoint_files_digest_checkpoints", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("digest", "path", name="pk_checkpoint_files"),
    )


def downgrade() -> None:
    op.drop_table("checkpoint_files")
    op.drop_index("ix_checkpoints_used_at", table_name="checkpoints")
    op.drop_table("checkpoints")
