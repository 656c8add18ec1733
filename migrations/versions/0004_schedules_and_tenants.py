"""Schedules, promotions, quotas of tenants, and the audit log

Revision ID: 0004
Revises: 0003
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from nightpress.core.database import UtcDateTime

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")
_TIME = UtcDateTime()


def _forbid_changes() -> None:
    """Make the audit log append-only: triggers in the database refuse to change or delete its rows."""
    if op.get_bind().dialect.name == "postgresql":
        op.execute(
            "CREATE FUNCTION nightpress_append_only() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'the audit log is append-only'; END $$"
        )
        op.execute(
            "CREATE TRIGGER audit_log_append_only BEFORE UPDATE OR DELETE ON audit_log "
            "FOR EACH ROW EXECUTE FUNCTION nightpress_append_only()"
        )
        return
    for change in ("UPDATE", "DELETE"):
        op.execute(
            f"CREATE TRIGGER audit_log_no_{change.lower()} BEFORE {change} ON audit_log "
            "BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END"
        )


def upgrade() -> None:
    op.create_table(
        "audit_log",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("at", _TIME, nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("key_id", sa.String(length=8), nullable=False),
        sa.Column("action", sa.String(length=200), nullable=False),
        sa.Column("subject", sa.String(length=1024), nullable=False),
        sa.Column("status", sa.Integer(), nullable=False),
        sa.Column("request_id", sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_log")),
    )
    op.create_index("ix_audit_log_tenant_id_id", "audit_log", ["tenant_id", "id"], unique=False)

    op.create_table(
        "gpu_usage",
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("month", sa.String(length=7), nullable=False),
        sa.Column("seconds", sa.Float(), nullable=False),
        sa.CheckConstraint("seconds >= 0", name=op.f("ck_gpu_usage_seconds")),
        sa.PrimaryKeyConstraint("tenant_id", "month", name=op.f("pk_gpu_usage")),
    )
    op.create_table(
        "schedules",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("cron", sa.String(length=200), nullable=False),
        sa.Column("timezone", sa.String(length=64), nullable=False),
        sa.Column("overlap", sa.String(length=8), nullable=False),
        sa.Column("catch_up", sa.String(length=8), nullable=False),
        sa.Column("only_if_changed", sa.Boolean(), nullable=False),
        sa.Column("suspended", sa.Boolean(), nullable=False),
        sa.Column("job", _JSON, nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("next_at", _TIME, nullable=True),
        sa.Column("created_by", sa.String(length=8), nullable=True),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("updated_at", _TIME, nullable=False),
        sa.CheckConstraint("catch_up IN ('none','latest','all')", name=op.f("ck_schedules_catch_up")),
        sa.CheckConstraint("overlap IN ('skip','queue','replace')", name=op.f("ck_schedules_overlap")),
        sa.CheckConstraint("NOT (suspended AND next_at IS NOT NULL)", name=op.f("ck_schedules_suspended")),
        sa.CheckConstraint("version >= 1", name=op.f("ck_schedules_version")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_schedules")),
        sa.UniqueConstraint("tenant_id", "name", name=op.f("uq_schedules_tenant_id_name")),
    )
    op.create_index(
        "ix_schedules_next_at",
        "schedules",
        ["next_at"],
        unique=False,
        postgresql_where=sa.text("next_at IS NOT NULL"),
        sqlite_where=sa.text("next_at IS NOT NULL"),
    )

    op.create_table(
        "tenants",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("max_queued_jobs", sa.Integer(), nullable=True),
        sa.Column("max_running_jobs", sa.Integer(), nullable=True),
        sa.Column("max_storage_bytes", sa.BigInteger(), nullable=True),
        sa.Column("max_gpu_seconds_month", sa.BigInteger(), nullable=True),
        sa.Column("rate_limit_per_minute", sa.Integer(), nullable=True),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.CheckConstraint(
            "max_queued_jobs >= 0 AND max_running_jobs >= 0 AND max_storage_bytes >= 0 AND max_gpu_seconds_month >= 0 AND rate_limit_per_minute >= 0",
            name=op.f("ck_tenants_quotas"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tenants")),
    )
    op.create_table(
        "promotions",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("model_name", sa.String(length=64), nullable=False),
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("cause", sa.String(length=12), nullable=False),
        sa.Column("created_by", sa.String(length=8), nullable=True),
        sa.Column("created_at", _TIME, nullable=False),
        sa.CheckConstraint("cause IN ('accepted','manual')", name=op.f("ck_promotions_cause")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_promotions_job_id_jobs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_promotions")),
    )
    op.create_index(op.f("ix_promotions_job_id"), "promotions", ["job_id"], unique=False)
    op.create_index("ix_promotions_latest", "promotions", ["tenant_id", "model_name", "id"], unique=False)

    op.create_table(
        "schedule_runs",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("schedule_id", sa.String(length=40), nullable=False),
        sa.Column("scheduled_for", _TIME, nullable=False),
        sa.Column("cause", sa.String(length=8), nullable=False),
        sa.Column("state", sa.String(length=12), nullable=False),
        sa.Column("reason", sa.String(length=16), nullable=True),
        sa.Column("error", _JSON, nullable=True),
        sa.Column("job_id", sa.String(length=40), nullable=True),
        sa.Column("digest", sa.String(length=80), nullable=True),
        sa.Column("created_at", _TIME, nullable=False),
        sa.CheckConstraint("(state = 'failed') = (error IS NOT NULL)", name=op.f("ck_schedule_runs_failed")),
        sa.CheckConstraint("(state = 'skipped') = (reason IS NOT NULL)", name=op.f("ck_schedule_runs_skipped")),
        sa.CheckConstraint("cause IN ('cron','manual')", name=op.f("ck_schedule_runs_cause")),
        sa.CheckConstraint(
            "reason IN ('overlap','unchanged','missed','replaced')", name=op.f("ck_schedule_runs_reason")
        ),
        sa.CheckConstraint("state IN ('pending','submitted','skipped','failed')", name=op.f("ck_schedule_runs_state")),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("fk_schedule_runs_job_id_jobs"), ondelete="SET NULL"
        ),
        sa.ForeignKeyConstraint(
            ["schedule_id"], ["schedules.id"], name=op.f("fk_schedule_runs_schedule_id_schedules"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_schedule_runs")),
        sa.UniqueConstraint("schedule_id", "scheduled_for", name=op.f("uq_schedule_runs_schedule_id_scheduled_for")),
    )
    op.create_index(op.f("ix_schedule_runs_job_id"), "schedule_runs", ["job_id"], unique=False)
    op.create_index("ix_schedule_runs_listing", "schedule_runs", ["schedule_id", "id"], unique=False)
    op.create_index(
        "ix_schedule_runs_pending",
        "schedule_runs",
        ["id"],
        unique=False,
        postgresql_where=sa.text("state = 'pending'"),
        sqlite_where=sa.text("state = 'pending'"),
    )

    op.add_column("api_keys", sa.Column("rotated_from", sa.String(length=8), nullable=True))
    op.create_index("ix_api_keys_tenant_id_created_at", "api_keys", ["tenant_id", "created_at"], unique=False)

    op.add_column("jobs", sa.Column("promote", sa.Boolean(), server_default=sa.text("true"), nullable=False))
    op.add_column("jobs", sa.Column("created_by", sa.String(length=8), nullable=True))

    _forbid_changes()


def downgrade() -> None:
    op.drop_column("jobs", "created_by")
    op.drop_column("jobs", "promote")

    op.drop_index("ix_api_keys_tenant_id_created_at", table_name="api_keys")
    op.drop_column("api_keys", "rotated_from")

    op.drop_index(
        "ix_schedule_runs_pending",
        table_name="schedule_runs",
        postgresql_where=sa.text("state = 'pending'"),
        sqlite_where=sa.text("state = 'pending'"),
    )
    op.drop_index("ix_schedule_runs_listing", table_name="schedule_runs")
    op.drop_index(op.f("ix_schedule_runs_job_id"), table_name="schedule_runs")

    op.drop_table("schedule_runs")
    op.drop_index("ix_promotions_latest", table_name="promotions")
    op.drop_index(op.f("ix_promotions_job_id"), table_name="promotions")

    op.drop_table("promotions")
    op.drop_table("tenants")
    op.drop_index(
        "ix_schedules_next_at",
        table_name="schedules",
        postgresql_where=sa.text("next_at IS NOT NULL"),
        sqlite_where=sa.text("next_at IS NOT NULL"),
    )

    op.drop_table("schedules")
    op.drop_table("gpu_usage")
    op.drop_index("ix_audit_log_tenant_id_id", table_name="audit_log")

    op.drop_table("audit_log")
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP FUNCTION nightpress_append_only()")
