"""The tables of webhooks, their deliveries and every attempt. They hold no secrets: see signing.py."""

import sqlalchemy as sa

from nightpress.core.database import JsonType, UtcDateTime, metadata

webhooks = sa.Table(
    "webhooks",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("tenant_id", sa.String(64), nullable=False),
    sa.Column("url", sa.String(2048), nullable=False),
    sa.Column("kind", sa.String(12), nullable=False, server_default=sa.text("'standard'")),
    sa.Column(
        "template", sa.Text, nullable=False, server_default=sa.text("''")
    ),  #: of its messages; empty: the usual text
    sa.Column("events", JsonType, nullable=False),
    sa.Column("generation", sa.Integer, nullable=False),  #: number of the secret in use
    sa.Column("previous_until", UtcDateTime),  #: time until which messages are also signed with the previous secret
    sa.Column("enabled", sa.Boolean, nullable=False),
    sa.Column("disabled_reason", sa.String(200)),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("created_by", sa.String(8)),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.CheckConstraint("generation >= 1 AND version >= 1", name="counters"),
    sa.Index("ix_webhooks_tenant_id_created_at_id", "tenant_id", "created_at", "id"),
)

webhook_deliveries = sa.Table(
    "webhook_deliveries",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),  #: the header webhook-id, the same at every attempt
    sa.Column("webhook_id", sa.ForeignKey("webhooks.id", ondelete="CASCADE"), nullable=False),
    sa.Column("event", sa.String(40), nullable=False),
    sa.Column("payload", JsonType, nullable=False),
    sa.Column("state", sa.String(12), nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("next_at", UtcDateTime),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.CheckConstraint("state IN ('pending','delivered','failed')", name="state"),
    sa.CheckConstraint("(state = 'pending') = (next_at IS NOT NULL)", name="next_at"),
    sa.Index("ix_webhook_deliveries_listing", "webhook_id", "created_at", "id"),
)
_PENDING = sa.text("state = 'pending'")
sa.Index("ix_webhook_deliveries_due", webhook_deliveries.c.next_at, postgresql_where=_PENDING, sqlite_where=_PENDING)

webhook_attempts = sa.Table(
    "webhook_attempts",
    metadata,
    sa.Column("delivery_id", sa.ForeignKey("webhook_deliveries.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("at", UtcDateTime, nullable=False),
    sa.Column("status", sa.Integer),
    sa.Column("error", sa.Text),
    sa.Column("duration_ms", sa.Integer, nullable=False),
)
