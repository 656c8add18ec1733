"""Idempotency keys for every POST, not only for the submission of a job

Revision ID: 0010
Revises: 0009
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from nightpress.core.database import UtcDateTime

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

_JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")


def upgrade() -> None:
    with op.batch_alter_table("idempotency_keys") as batch:
        batch.alter_column("job_id", existing_type=sa.String(length=40), nullable=True)
        batch.add_column(sa.Column("attempt_id", sa.String(length=40), nullable=True))
        batch.add_column(sa.Column("locked_until", UtcDateTime(), nullable=True))
        batch.add_column(sa.Column("status", sa.Integer(), nullable=True))
        batch.add_column(sa.Column("headers", _JSON, nullable=True))
        batch.add_column(sa.Column("body", sa.LargeBinary(), nullable=True))
        kind = "(job_id IS NULL) = (attempt_id IS NOT NULL)"
        batch.create_check_constraint(op.f("ck_idempotency_keys_one_kind"), kind)
    op.create_index("ix_idempotency_keys_created_at", "idempotency_keys", ["created_at"])


def downgrade() -> None:
    op.drop_index("ix_idempotency_keys_created_at", table_name="idempotency_keys")
    op.execute("DELETE FROM idempotency_keys WHERE job_id IS NULL")
    with op.batch_alter_table("idempotency_keys") as batch:
        batch.drop_constraint(op.f("ck_idempotency_keys_one_kind"), type_="check")
        for column in ("body", "headers", "status", "locked_until", "attempt_id"):
            batch.drop_column(column)
        batch.alter_column("job_id", existing_type=sa.String(length=40), nullable=False)
