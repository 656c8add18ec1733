"""The tables of webhooks, their deliveries and every attempt. They hold no secrets: see signing.py."""

from sqlalchemy import Boolean, CheckConstraint, Column, ForeignKey, Index, Integer, String, Table, Text, text

from nightpress.core.database import JsonType, UtcDateTime, metadata

webhooks = Table(
    "webhooks",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("tenant_id", String(64), nullable=False),
    Column("url", String(2048), nullable=False),
    Column("kind", String(12), nullable=False, server_default=text("'standard'")),
    Column("template", Text, nullable=False, server_default=text("''")),  #: of its messages; empty: the usual text
    Column("events", JsonType, nullable=False),
    Column("generation", Integer, nullable=False),  #: number of the secret in use
    Column("previous_until", UtcDateTime),  #: time until which messages are also signed with the previous secret
    Column("enabled", Boolean, nullable=False),
    Column("disabled_reason", String(200)),
    Column("version", Integer, nullable=False),
    Column("created_by", String(8)),
    Column("created_at", UtcDateTime, nullable=False),
    CheckConstraint("generation >= 1 AND version >= 1", name="counters"),
    Index("ix_webhooks_tenant_id_created_at_id", "tenant_id", "created_at", "id"),
)

webhook_deliveries = Table(
    "webhook_deliveries",
    metadata,
    Column("id", String(40), primary_key=True),  #: the header webhook-id, the same at every attempt
    Column("webhook_id", ForeignKey("webhooks.id", ondelete="CASCADE"), nullable=False),
    Column("event", String(40), nullable=False),
    Column("payload", JsonType, nullable=False),
    Column("state", String(12), nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("next_at", UtcDateTime),
    Column("created_at", UtcDateTime, nullable=False),
    CheckConstraint("state IN ('pending','delivered','failed')", name="state"),
    CheckConstraint("(state = 'pending') = (next_at IS NOT NULL)", name="next_at"),
    Index("ix_webhook_deliveries_listing", "webhook_id", "created_at", "id"),
)
_PENDING = text("state = 'pending'")
Index("ix_webhook_deliveries_due", webhook_deliveries.c.next_at, postgresql_where=_PENDING, sqlite_where=_PENDING)

webhook_attempts = Table(
    "webhook_attempts",
    metadata,
    Column("delivery_id", ForeignKey("webhook_deliveries.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("at", UtcDateTime, nullable=False),
    Column("status", Integer),
    Column("error", Text),
    Column("duration_ms", Integer, nullable=False),
)
