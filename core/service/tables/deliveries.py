"""The tables of deliveries, their attempts, and the credentials and standing destinations that tenants store."""

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    Integer,
    String,
    Table,
    Text,
    UniqueConstraint,
    literal_column,
    text,
)

from nightpress.core.database import JsonType, UtcDateTime, metadata

#: What a destination is reached with, encrypted: see core/service/vault.py. Nothing reads it back to a user.
destination_credentials = Table(
    "destination_credentials",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("tenant_id", String(64), nullable=False),
    Column("prefix", String(1024), nullable=False),  #: of the addresses that it is for
    Column("sealed", Text, nullable=False),
    Column("sealed_by", String(16), nullable=False),  #: the key that encrypted it
    Column("version", Integer, nullable=False),
    Column("created_by", String(8)),
    Column("created_at", UtcDateTime, nullable=False),
    Column("rotated_at", UtcDateTime, nullable=False),
    CheckConstraint("version >= 1", name="version"),
    UniqueConstraint("tenant_id", "prefix"),
    Index("ix_destination_credentials_listing", "tenant_id", "created_at", "id"),
)

#: Where each result that becomes the latest of a model's name goes.
model_destinations = Table(
    "model_destinations",
    metadata,
    Column("tenant_id", String(64), primary_key=True),
    Column("model_name", String(64), primary_key=True),
    Column("destinations", JsonType, nullable=False),
    Column("version", Integer, nullable=False),
    Column("set_by", String(8)),
    Column("set_at", UtcDateTime, nullable=False),
    CheckConstraint("version >= 1", name="version"),
)

#: One artifact on its way to one address.
deliveries = Table(
    "deliveries",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("tenant_id", String(64), nullable=False),
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("artifact", String(40), nullable=False),  #: its format
    Column("destination", String(1024), nullable=False),
    Column("state", String(12), nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("next_at", UtcDateTime),
    Column("claim_id", String(40)),
    Column("claim_until", UtcDateTime),
    Column("total_bytes", BigInteger, nullable=False),
    Column("sent_bytes", BigInteger, nullable=False),
    Column("resume", JsonType, nullable=False),  #: what the next attempt goes on from, by file
    Column("result", JsonType),  #: where it is, e.g. the commit of the Hub
    Column("error", JsonType),  #: of the last attempt
    Column("created_by", String(8)),
    Column("created_at", UtcDateTime, nullable=False),
    Column("finished_at", UtcDateTime),
    CheckConstraint("state IN ('pending','delivered','failed','cancelled','superseded')", name="state"),
    CheckConstraint("(state = 'pending') = (next_at IS NOT NULL)", name="next_at"),
    CheckConstraint("(state = 'pending') = (finished_at IS NULL)", name="finished"),
    CheckConstraint("(claim_id IS NULL) = (claim_until IS NULL)", name="claim"),
    CheckConstraint("claim_id IS NULL OR state = 'pending'", name="claimed"),
    CheckConstraint("(state = 'delivered') = (result IS NOT NULL)", name="result"),
    CheckConstraint("attempts >= 0 AND sent_bytes >= 0 AND total_bytes >= 0", name="counters"),
    Index("ix_deliveries_listing", "tenant_id", "created_at", "id"),
)
#: Written as text in statements too, so that the partial indexes are used.
IS_PENDING = deliveries.c.state == literal_column("'pending'")
_PENDING = text("state = 'pending'")
Index("ix_deliveries_due", deliveries.c.next_at, postgresql_where=_PENDING, sqlite_where=_PENDING)
Index("ix_deliveries_destination", deliveries.c.tenant_id, deliveries.c.destination, deliveries.c.created_at)

delivery_attempts = Table(
    "delivery_attempts",
    metadata,
    Column("delivery_id", ForeignKey("deliveries.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("at", UtcDateTime, nullable=False),
    Column("error", JsonType),  #: NULL: it was delivered
    Column("sent_bytes", BigInteger, nullable=False),  #: in this attempt
    Column("duration_ms", BigInteger, nullable=False),
)
