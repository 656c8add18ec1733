"""Deliveries of results, and signed statements about them

Revision ID: 0021
Revises: 0020
"""

import sqlalchemy as sa
from alembic import op

from nightpress.core.database import JsonType, UtcDateTime

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "destination_credentials",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("prefix", sa.String(length=1024), nullable=False),
        sa.Column("sealed", sa.Text(), nullable=False),
        sa.Column("sealed_by", sa.String(length=16), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("created_by", sa.String(length=8), nullable=True),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("rotated_at", UtcDateTime(), nullable=False),
        sa.CheckConstraint("version >= 1", name=op.f("ck_destination_credentials_version")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_destination_credentials")),
        sa.UniqueConstraint("tenant_id", "prefix", name=op.f("uq_destination_credentials_tenant_id_prefix")),
    )
    op.create_index("ix_destination_credentials_listing", "destination_credentials", ["tenant_id", "created_at", "id"])

    op.create_table(
        "model_destinations",
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("model_name", sa.String(length=64), nullable=False),
        sa.Column("destinations", JsonType, nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("set_by", sa.String(length=8), nullable=True),
        sa.Column("set_at", UtcDateTime(), nullable=False),
        sa.CheckConstraint("version >= 1", name=op.f("ck_model_destinations_version")),
        sa.PrimaryKeyConstraint("tenant_id", "model_name", name=op.f("pk_model_destinations")),
    )
    op.create_table(
        "signing_keys",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("public_key", sa.Text(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_signing_keys")),
    )
    op.create_table(
        "deliveries",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("artifact", sa.String(length=40), nullable=False),
        sa.Column("destination", sa.String(length=1024), nullable=False),
        sa.Column("state", sa.String(length=12), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("next_at", UtcDateTime(), nullable=True),
        sa.Column("claim_id", sa.String(length=40), nullable=True),
        sa.Column("claim_until", UtcDateTime(), nullable=True),
        sa.Column("total_bytes", sa.BigInteger(), nullable=False),
        sa.Column("sent_bytes", sa.BigInteger(), nullable=False),
        sa.Column("resume", JsonType, nullable=False),
        sa.Column("result", JsonType, nullable=True),
        sa.Column("error", JsonType, nullable=True),
        sa.Column("created_by", sa.String(length=8), nullable=True),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("finished_at", UtcDateTime(), nullable=True),
        sa.CheckConstraint("(state = 'delivered') = (result IS NOT NULL)", name=op.f("ck_deliveries_result")),
        sa.CheckConstraint("(state = 'pending') = (finished_at IS NULL)", name=op.f("ck_deliveries_finished")),
        sa.CheckConstraint("(state = 'pending') = (next_at IS NOT NULL)", name=op.f("ck_deliveries_next_at")),
        sa.CheckConstraint("claim_id IS NULL OR state = 'pending'", name=op.f("ck_deliveries_claimed")),
        sa.CheckConstraint(
            "state IN ('pending','delivered','failed','cancelled','superseded')", name=op.f("ck_deliveries_state")
        ),
        sa.CheckConstraint("(claim_id IS NULL) = (claim_until IS NULL)", name=op.f("ck_deliveries_claim")),
        sa.CheckConstraint(
            "attempts >= 0 AND sent_bytes >= 0 AND total_bytes >= 0", name=op.f("ck_deliveries_counters")
        ),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_deliveries_job_id_jobs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_deliveries")),
    )
    op.create_index("ix_deliveries_destination", "deliveries", ["tenant_id", "destination", "created_at"])
    op.create_index(
        "ix_deliveries_due",
        "deliveries",
        ["next_at"],
        postgresql_where=sa.text("state = 'pending'"),
        sqlite_where=sa.text("state = 'pending'"),
    )
    op.create_index("ix_deliveries_job_id", "deliveries", ["job_id"])
    op.create_index("ix_deliveries_listing", "deliveries", ["tenant_id", "created_at", "id"])

    op.create_table(
        "attestations",
        sa.Column("artifact_id", sa.String(length=40), nullable=False),
        sa.Column("bundle", JsonType, nullable=True),
        sa.Column("key_id", sa.String(length=64), nullable=True),
        sa.Column("signed_at", UtcDateTime(), nullable=True),
        sa.CheckConstraint(
            "(bundle IS NULL) = (key_id IS NULL) AND (bundle IS NULL) = (signed_at IS NULL)",
            name=op.f("ck_attestations_signed"),
        ),
        sa.ForeignKeyConstraint(
            ["artifact_id"],
            ["job_artifacts.id"],
            name=op.f("fk_attestations_artifact_id_job_artifacts"),
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(["key_id"], ["signing_keys.id"], name=op.f("fk_attestations_key_id_signing_keys")),
        sa.PrimaryKeyConstraint("artifact_id", name=op.f("pk_attestations")),
    )
    op.create_index(
        "ix_attestations_unsigned",
        "attestations",
        ["artifact_id"],
        postgresql_where=sa.text("bundle IS NULL"),
        sqlite_where=sa.text("bundle IS NULL"),
    )

    op.create_table(
        "delivery_attempts",
        sa.Column("delivery_id", sa.String(length=40), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("at", UtcDateTime(), nullable=False),
        sa.Column("error", JsonType, nullable=True),
        sa.Column("sent_bytes", sa.BigInteger(), nullable=False),
        sa.Column("duration_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["delivery_id"],
            ["deliveries.id"],
            name=op.f("fk_delivery_attempts_delivery_id_deliveries"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("delivery_id", "number", name=op.f("pk_delivery_attempts")),
    )
    op.add_column("jobs", sa.Column("destinations", JsonType, server_default=sa.text("'[]'"), nullable=False))


def downgrade() -> None:
    op.drop_column("jobs", "destinations")
    for table in (
        "delivery_attempts",
        "deliveries",
        "model_destinations",
        "destination_credentials",
        "attestations",
        "signing_keys",
    ):
        op.drop_table(table)
