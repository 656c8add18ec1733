"""The first tables

Revision ID: 0001
Revises: nothing
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from nightpress.core.database import UtcDateTime

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")
_TIME = UtcDateTime()


def upgrade() -> None:
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(length=8), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("scopes", _JSON, nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("expires_at", _TIME, nullable=True),
        sa.Column("revoked_at", _TIME, nullable=True),
        sa.Column("last_used_at", _TIME, nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
    )
    op.create_table(
        "data_sets",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("source", sa.String(length=16), nullable=False),
        sa.Column("server_path", sa.String(length=4096), nullable=True),
        sa.Column("digest", sa.String(length=80), nullable=True),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("rows", sa.BigInteger(), nullable=True),
        sa.Column("labels", sa.Integer(), nullable=True),
        sa.Column("files", _JSON, nullable=False),
        sa.Column("error", _JSON, nullable=True),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("deleted_at", _TIME, nullable=True),
        sa.CheckConstraint("(source = 'path') = (server_path IS NOT NULL)", name=op.f("ck_data_sets_server_path")),
        sa.CheckConstraint("source IN ('upload', 'path')", name=op.f("ck_data_sets_source")),
        sa.CheckConstraint(
            "state <> 'ready' OR (digest IS NOT NULL AND rows > 0)", name=op.f("ck_data_sets_ready_is_whole")
        ),
        sa.CheckConstraint("state IN ('uploading', 'ready', 'failed')", name=op.f("ck_data_sets_state")),
        sa.CheckConstraint("size >= 0", name=op.f("ck_data_sets_size")),
        sa.PrimaryKeyConstraint("id", name="pk_data_sets"),
    )
    op.create_index("ix_data_sets_state_created_at", "data_sets", ["state", "created_at"])
    op.create_index("ix_data_sets_tenant_id_name_id", "data_sets", ["tenant_id", "name", "id"])

    op.create_table(
        "models",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("source", sa.String(length=16), nullable=False),
        sa.Column("server_path", sa.String(length=4096), nullable=True),
        sa.Column("digest", sa.String(length=80), nullable=True),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("architecture", sa.String(length=128), nullable=True),
        sa.Column("model_type", sa.String(length=64), nullable=True),
        sa.Column("task", sa.String(length=32), nullable=True),
        sa.Column("parameters", sa.BigInteger(), nullable=True),
        sa.Column("files", _JSON, nullable=False),
        sa.Column("header", _JSON, nullable=True),
        sa.Column("error", _JSON, nullable=True),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("deleted_at", _TIME, nullable=True),
        sa.CheckConstraint("(source = 'path') = (server_path IS NOT NULL)", name=op.f("ck_models_server_path")),
        sa.CheckConstraint("source IN ('upload', 'path')", name=op.f("ck_models_source")),
        sa.CheckConstraint(
            "state <> 'ready' OR (digest IS NOT NULL AND parameters IS NOT NULL)", name=op.f("ck_models_ready_is_whole")
        ),
        sa.CheckConstraint("state IN ('uploading', 'ready', 'failed')", name=op.f("ck_models_state")),
        sa.CheckConstraint("size >= 0", name=op.f("ck_models_size")),
        sa.PrimaryKeyConstraint("id", name="pk_models"),
    )
    op.create_index("ix_models_state_created_at", "models", ["state", "created_at"])
    op.create_index("ix_models_tenant_id_name_id", "models", ["tenant_id", "name", "id"])

    op.create_table(
        "workers",
        sa.Column("id", sa.String(length=80), nullable=False),
        sa.Column("host", sa.String(length=255), nullable=False),
        sa.Column("queue", sa.String(length=8), nullable=False),
        sa.Column("device", sa.String(length=200), nullable=False),
        sa.Column("memory", sa.BigInteger(), nullable=False),
        sa.Column("threads", sa.Integer(), nullable=False),
        sa.Column("version", sa.String(length=40), nullable=False),
        sa.Column("draining", sa.Boolean(), nullable=False),
        sa.Column("started_at", _TIME, nullable=False),
        sa.Column("last_seen_at", _TIME, nullable=False),
        sa.CheckConstraint("queue IN ('cpu','gpu')", name=op.f("ck_workers_queue")),
        sa.PrimaryKeyConstraint("id", name="pk_workers"),
    )
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("state", sa.String(length=12), nullable=False),
        sa.Column("verdict", sa.String(length=12), nullable=True),
        sa.Column("phase", sa.String(length=16), nullable=True),
        sa.Column("progress", sa.Float(), server_default=sa.text("0"), nullable=False),
        sa.Column("pass_index", sa.Integer(), nullable=True),
        sa.Column("eta_s", sa.Float(), nullable=True),
        sa.Column("message", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("priority", sa.SmallInteger(), nullable=False),
        sa.Column("labels", _JSON, nullable=False),
        sa.Column("queue", sa.String(length=8), nullable=False),
        sa.Column("needs_memory", sa.BigInteger(), nullable=False),
        sa.Column("model_id", sa.String(length=40), nullable=False),
        sa.Column("model_name", sa.String(length=64), nullable=False),
        sa.Column("model_digest", sa.String(length=80), nullable=False),
        sa.Column("recipe", _JSON, nullable=False),
        sa.Column("data", _JSON, nullable=False),
        sa.Column("attempt", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("failures", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("max_failures", sa.Integer(), nullable=False),
        sa.Column("error", _JSON, nullable=True),
        sa.Column("error_code", sa.String(length=40), nullable=True),
        sa.Column("retry_of", sa.String(length=40), nullable=True),
        sa.Column("worker_id", sa.String(length=80), nullable=True),
        sa.Column("lease_id", sa.String(length=40), nullable=True),
        sa.Column("lease_expires_at", _TIME, nullable=True),
        sa.Column("queue_limit_s", sa.Float(), nullable=True),
        sa.Column("run_limit_s", sa.Float(), nullable=False),
        sa.Column("stall_s", sa.Float(), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("run_after", _TIME, nullable=False),
        sa.Column("start_before", _TIME, nullable=True),
        sa.Column("started_at", _TIME, nullable=True),
        sa.Column("progressed_at", _TIME, nullable=True),
        sa.Column("finished_at", _TIME, nullable=True),
        sa.Column("event_seq", sa.Integer(), nullable=False),
        sa.Column("log_seq", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.CheckConstraint("(state = 'failed') = (error IS NOT NULL)", name=op.f("ck_jobs_error")),
        sa.CheckConstraint("(state = 'succeeded') = (verdict IS NOT NULL)", name=op.f("ck_jobs_verdict")),
        sa.CheckConstraint("(state IN ('running','cancelling')) = (lease_id IS NOT NULL)", name=op.f("ck_jobs_lease")),
        sa.CheckConstraint(
            "(state IN ('succeeded','failed','cancelled')) = (finished_at IS NOT NULL)", name=op.f("ck_jobs_finished")
        ),
        sa.CheckConstraint("queue IN ('cpu','gpu')", name=op.f("ck_jobs_queue")),
        sa.CheckConstraint(
            "state IN ('queued','running','cancelling','succeeded','failed','cancelled')", name=op.f("ck_jobs_state")
        ),
        sa.CheckConstraint("verdict IN ('accepted','rejected')", name=op.f("ck_jobs_verdict_value")),
        sa.CheckConstraint("(error IS NULL) = (error_code IS NULL)", name=op.f("ck_jobs_error_code")),
        sa.CheckConstraint("(lease_id IS NULL) = (lease_expires_at IS NULL)", name=op.f("ck_jobs_lease_expiry")),
        sa.CheckConstraint("attempt >= 0 AND needs_memory >= 0 AND event_seq >= 1", name=op.f("ck_jobs_counters")),
        sa.CheckConstraint(
            "failures >= 0 AND failures <= max_failures AND max_failures >= 1", name=op.f("ck_jobs_failures")
        ),
        sa.CheckConstraint("progress >= 0 AND progress <= 1", name=op.f("ck_jobs_progress")),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name="fk_jobs_model_id_models"),
        sa.ForeignKeyConstraint(["retry_of"], ["jobs.id"], name="fk_jobs_retry_of_jobs", ondelete="SET NULL"),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
    )
    op.create_index(
        "ix_jobs_claim",
        "jobs",
        ["queue", "tenant_id", sa.literal_column("priority DESC"), "created_at", "id"],
        postgresql_include=["run_after", "needs_memory"],
        postgresql_where=sa.text("state = 'queued'"),
        sqlite_where=sa.text("state = 'queued'"),
    )
    op.create_index(
        "ix_jobs_finished",
        "jobs",
        ["finished_at", "state", "queue", "error_code"],
        postgresql_where=sa.text("finished_at IS NOT NULL"),
        sqlite_where=sa.text("finished_at IS NOT NULL"),
    )
    op.create_index(
        "ix_jobs_leased",
        "jobs",
        ["tenant_id", "lease_expires_at"],
        postgresql_where=sa.text("lease_expires_at IS NOT NULL"),
        sqlite_where=sa.text("lease_expires_at IS NOT NULL"),
    )
    op.create_index("ix_jobs_listing", "jobs", ["tenant_id", "created_at", "id"])
    op.create_index("ix_jobs_listing_by_state", "jobs", ["tenant_id", "state", "created_at", "id"])
    op.create_index("ix_jobs_model_id", "jobs", ["model_id"])
    op.create_index(
        "ix_jobs_start_before",
        "jobs",
        ["start_before"],
        postgresql_where=sa.text("start_before IS NOT NULL"),
        sqlite_where=sa.text("start_before IS NOT NULL"),
    )

    op.create_table(
        "uploads",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("model_id", sa.String(length=40), nullable=True),
        sa.Column("data_set_id", sa.String(length=40), nullable=True),
        sa.Column("path", sa.String(length=512), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("part_size", sa.BigInteger(), nullable=False),
        sa.Column("part_sha256", _JSON, nullable=False),
        sa.Column("store_upload_id", sa.String(length=1024), nullable=False),
        sa.Column("verified", sa.Boolean(), nullable=False),
        sa.CheckConstraint("(model_id IS NULL) <> (data_set_id IS NULL)", name=op.f("ck_uploads_one_owner")),
        sa.CheckConstraint("size > 0 AND part_size > 0", name=op.f("ck_uploads_size")),
        sa.ForeignKeyConstraint(
            ["data_set_id"], ["data_sets.id"], name="fk_uploads_data_set_id_data_sets", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name="fk_uploads_model_id_models", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name="pk_uploads"),
    )
    op.create_index("uq_uploads_data_set_id_path", "uploads", ["data_set_id", "path"], unique=True)
    op.create_index("uq_uploads_model_id_path", "uploads", ["model_id", "path"], unique=True)

    op.create_table(
        "idempotency_keys",
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("key", sa.String(length=255), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_idempotency_keys_job_id_jobs", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("tenant_id", "key", name="pk_idempotency_keys"),
    )
    op.create_table(
        "job_artifacts",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("format", sa.String(length=40), nullable=False),
        sa.Column("path", sa.String(length=512), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("digest", sa.String(length=80), nullable=False),
        sa.Column("consumer", sa.String(length=200), nullable=False),
        sa.Column("files", _JSON, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_job_artifacts_job_id_jobs", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name="pk_job_artifacts"),
        sa.UniqueConstraint("job_id", "path", name="uq_job_artifacts_job_id_path"),
    )
    op.create_table(
        "job_attempts",
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("lease_id", sa.String(length=40), nullable=False),
        sa.Column("worker_id", sa.String(length=80), nullable=False),
        sa.Column("started_at", _TIME, nullable=False),
        sa.Column("finished_at", _TIME, nullable=True),
        sa.Column("outcome", sa.String(length=12), nullable=True),
        sa.Column("error", _JSON, nullable=True),
        sa.Column("swept", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.CheckConstraint(
            "outcome IN ('succeeded','failed','cancelled','released','lost')", name=op.f("ck_job_attempts_outcome")
        ),
        sa.CheckConstraint("(outcome IS NULL) = (finished_at IS NULL)", name=op.f("ck_job_attempts_closed")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_job_attempts_job_id_jobs", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "number", name="pk_job_attempts"),
        sa.UniqueConstraint("lease_id", name="uq_job_attempts_lease_id"),
    )
    op.create_index(
        "ix_job_attempts_sweepable",
        "job_attempts",
        ["finished_at"],
        postgresql_where=sa.text("outcome <> 'succeeded' AND NOT swept"),
        sqlite_where=sa.text("outcome <> 'succeeded' AND NOT swept"),
    )

    op.create_table(
        "job_events",
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("seq", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("at", _TIME, nullable=False),
        sa.Column("kind", sa.String(length=40), nullable=False),
        sa.Column("data", _JSON, nullable=False),
        sa.CheckConstraint("seq >= 1", name=op.f("ck_job_events_seq")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_job_events_job_id_jobs", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "seq", name="pk_job_events"),
    )
    op.create_table(
        "job_logs",
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("seq", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("at", _TIME, nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("level", sa.String(length=8), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_job_logs_job_id_jobs", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "seq", name="pk_job_logs"),
    )
    op.create_table(
        "job_metrics",
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("position", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("subject", sa.String(length=200), nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("value", sa.Float(), nullable=False),
        sa.Column("unit", sa.String(length=40), nullable=False),
        sa.Column("low", sa.Float(), nullable=True),
        sa.Column("high", sa.Float(), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_job_metrics_job_id_jobs", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "position", name="pk_job_metrics"),
    )
    op.create_table(
        "job_reports",
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("report", _JSON, nullable=False),
        sa.Column("files", _JSON, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_job_reports_job_id_jobs", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", name="pk_job_reports"),
    )


def downgrade() -> None:
    op.drop_table("job_reports")
    op.drop_table("job_metrics")
    op.drop_table("job_logs")
    op.drop_table("job_events")

    op.drop_table("job_attempts")
    op.drop_table("job_artifacts")
    op.drop_table("idempotency_keys")

    op.drop_table("uploads")

    op.drop_table("jobs")
    op.drop_table("workers")

    op.drop_table("models")

    op.drop_table("data_sets")
    op.drop_table("api_keys")
