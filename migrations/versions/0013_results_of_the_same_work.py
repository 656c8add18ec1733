"""Only a result of the same work is reused, and lists are in the database's order

Before this revision, the fingerprint of a job that was submitted with an idempotency key was a digest of the request's body. The rows do
not show which jobs these are, so every fingerprint is deleted. A job that reused the result of other weights or other data keeps its row
and its report, but loses its artifacts and its promotions.

Schedules that did not set `reuse` now reuse the results of identical jobs, as the documentation says.

Revision ID: 0013
Revises: 0012
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

from nightpress.core.database import JsonType

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

_BATCH = 500
#: index → (table, first columns, old last columns, new last columns): the newest row is the newest by the database's time, not by its id
_INDEXES = {
    "ix_promotions_latest": ("promotions", ["tenant_id", "model_name"], ["id"], ["created_at", "id"]),
    "ix_schedule_runs_listing": ("schedule_runs", ["schedule_id"], ["id"], ["created_at", "id"]),
    "ix_webhook_deliveries_listing": ("webhook_deliveries", ["webhook_id"], ["id"], ["created_at", "id"]),
}
#: table → (first columns, old last columns, new last columns), for indexes that are named after their columns
_RENAMED = {
    "webhooks": (["tenant_id"], ["id"], ["created_at", "id"]),
    "audit_log": (["tenant_id"], ["id"], ["at", "id"]),
    "models": (["tenant_id", "name"], ["id"], ["created_at", "id"]),
    "data_sets": (["tenant_id", "name"], ["id"], ["created_at", "id"]),
}


def upgrade() -> None:
    op.add_column("jobs", sa.Column("engine", sa.String(length=40), nullable=True))
    op.add_column("schedule_runs", sa.Column("fingerprint", sa.String(length=64), nullable=True))
    op.execute("UPDATE jobs SET fingerprint = NULL WHERE fingerprint IS NOT NULL")
    _take_back_wrong_results(op.get_bind())
    _forget_what_no_schedule_said(op.get_bind())
    for name, (table, owner, _, new) in _INDEXES.items():
        op.drop_index(name, table_name=table)
        op.create_index(name, table, [*owner, *new])
    for table, (owner, old, new) in _RENAMED.items():
        op.drop_index(_name(table, owner, old), table_name=table)
        op.create_index(_name(table, owner, new), table, [*owner, *new])
    op.create_index("ix_audit_log_at_id", "audit_log", ["at", "id"])


def downgrade() -> None:
    op.drop_index("ix_audit_log_at_id", table_name="audit_log")
    for table, (owner, old, new) in _RENAMED.items():
        op.drop_index(_name(table, owner, new), table_name=table)
        op.create_index(_name(table, owner, old), table, [*owner, *old])
    for name, (table, owner, old, _) in _INDEXES.items():
        op.drop_index(name, table_name=table)
        op.create_index(name, table, [*owner, *old])
    op.drop_column("schedule_runs", "fingerprint")
    op.drop_column("jobs", "engine")


def _name(table: str, owner: list[str], more: list[str]) -> str:
    return "_".join(["ix", table, *owner, *more])


def _take_back_wrong_results(connection: sa.Connection) -> None:
    jobs = sa.table(
        "jobs",
        sa.column("id"),
        sa.column("reused_from"),
        sa.column("model_digest"),
        sa.column("data", JsonType),
        sa.column("artifacts_state"),
    )
    made = jobs.alias("made")
    query = sa.select(jobs.c.id, jobs.c.model_digest, jobs.c.data, made.c.model_digest, made.c.data).join_from(
        jobs, made, made.c.id == jobs.c.reused_from
    )
    wrong = [row[0] for row in connection.execute(query) if (row[1], _digests(row[2])) != (row[3], _digests(row[4]))]
    for begin in range(0, len(wrong), _BATCH):
        batch = wrong[begin : begin + _BATCH]
        for table in ("promotions", "job_artifacts"):
            told = sa.table(table, sa.column("job_id"))
            connection.execute(sa.delete(told).where(told.c.job_id.in_(batch)))
        connection.execute(sa.update(jobs).where(jobs.c.id.in_(batch)).values(artifacts_state="gone"))


def _forget_what_no_schedule_said(connection: sa.Connection) -> None:
    """Remove `reuse: false` from schedules: it was written into every schedule that did not set it, and prevented reuse."""
    schedules = sa.table("schedules", sa.column("id"), sa.column("job", JsonType))
    for row in connection.execute(sa.select(schedules.c.id, schedules.c.job)).all():
        if row.job.get("reuse") is False:
            job = {key: value for key, value in row.job.items() if key != "reuse"}
            connection.execute(sa.update(schedules).where(schedules.c.id == row.id).values(job=job))


def _digests(data: dict[str, Any]) -> dict[str, Any]:
    return {name: data_set.get("digest") for name, data_set in data.items()}
