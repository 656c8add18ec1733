"""Artifacts may be pruned, and old rows of the audit log may be deleted

Revision ID: 0011
Revises: 0010
"""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

_REFUSE = "BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END"


def upgrade() -> None:
    kept = sa.Column("artifacts_state", sa.String(length=8), server_default=sa.text("'kept'"), nullable=False)
    op.add_column("jobs", kept)
    if op.get_bind().dialect.name == "postgresql":
        op.execute(
            "CREATE OR REPLACE FUNCTION nightpress_append_only() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN IF TG_OP = 'DELETE' AND OLD.at < clock_timestamp() - interval '30 days' THEN RETURN OLD; END IF; "
            "RAISE EXCEPTION 'the audit log is append-only'; END $$"
        )
        return
    op.execute("DROP TRIGGER audit_log_no_delete")
    young = "WHEN OLD.at >= strftime('%Y-%m-%d %H:%M:%f', 'now', '-30 days')"
    op.execute(f"CREATE TRIGGER audit_log_no_delete BEFORE DELETE ON audit_log {young} {_REFUSE}")


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.execute(
            "CREATE OR REPLACE FUNCTION nightpress_append_only() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'the audit log is append-only'; END $$"
        )
    else:
        op.execute("DROP TRIGGER audit_log_no_delete")
        op.execute(f"CREATE TRIGGER audit_log_no_delete BEFORE DELETE ON audit_log {_REFUSE}")
    op.drop_column("jobs", "artifacts_state")
