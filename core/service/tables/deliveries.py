"""The tables of deliveries, their attempts, and the credentials and standing destinations that tenants store."""

import sqlalchemy as sa

from nightpress.core.database import JsonType, UtcDateTime, metadata

#: What a destination is reached with, encrypted: see core/service/vault.py. Nothing reads it back to a user.
destination_credentials = sa.Table(
    "destination_credentials",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("tenant_id", sa.String(64), nullable=False),
    sa.Column("prefix", sa.String(1024), nullable=False),  #: of the addresses that it is for
    sa.Column("sealed", sa.Text, nullable=False),
    sa.Column("sealed_by", sa.String(16), nullable=False),  #: the key that encrypted it
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("created_by", sa.String(8)),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("rotated_at", UtcDateTime, nullable=False),
    sa.CheckConstraint("version >= 1", name="version"),
    sa.UniqueConstraint("tenant_id", "prefix"),
    sa.Index("ix_destination_credentials_listing", "tenant_id", "created_at", "id"),
)

#: Where each result that becomes the latest of a model's name goes.
model_destinations = sa.Table(
    "model_destinations",
    metadata,
    sa.Column("tenant_id", sa.String(64), primary_key=True),
    sa.Column("model_name", sa.String(64), primary_key=True),
    sa.Column("destinations", JsonType, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("set_by", sa.String(8)),
    sa.Column("set_at", UtcDateTime, nullable=False),
    sa.CheckConstraint("version >= 1", name="version"),
)

#: One artifact on its way to one address.
deliveries = sa.Table(
    "deliveries",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("tenant_id", sa.String(64), nullable=False),
    sa.Column("job_id", sa.ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False, index=True),
    sa.Column("artifact", sa.String(40), nullable=False),  #: its format
    sa.Column("destination", sa.String(1024), nullable=False),
    sa.Column("state", sa.String(12), nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("next_at", UtcDateTime),
    sa.Column("claim_id", sa.String(40)),
    sa.Column("claim_until", UtcDateTime),
    sa.Column("total_bytes", sa.BigInteger, nullable=False),
    sa.Column("sent_bytes", sa.BigInteger, nullable=False),
    sa.Column("resume", JsonType, nullable=False),  #: what the next attempt goes on from, by file
    sa.Column("result", JsonType),  #: where it is, e.g. the commit of the Hub
    sa.Column("error", JsonType),  #: of the last attempt
    sa.Column("created_by", sa.String(8)),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("finished_at", UtcDateTime),
    sa.CheckConstraint("state IN ('pending','delivered','failed','cancelled','superseded')", name="state"),
    sa.CheckConstraint("(state = 'pending') = (next_at IS NOT NULL)", name="next_at"),
    sa.CheckConstraint("(state = 'pending') = (finished_at IS NULL)", name="finished"),
    sa.CheckConstraint("(claim_id IS NULL) = (claim_until IS NULL)", name="claim"),
    sa.CheckConstraint("claim_id IS NULL OR state = 'pending'", name="claimed"),
    sa.CheckConstraint("(state = 'delivered') = (result IS NOT NULL)", name="result"),
    sa.CheckConstraint("attempts >= 0 AND sent_bytes >= 0 AND total_bytes >= 0", name="counters"),
    sa.Index("ix_deliveries_listing", "tenant_id", "created_at", "id"),
)
#: Written as text in statements too, so that the partial indexes are used.
IS_PENDING = deliveries.c.state == sa.literal_column("'pending'")
_PENDING = sa.text("state = 'pending'")
sa.Index("ix_deliveries_due", deliveries.c.next_at, postgresql_where=_PENDING, sqlite_where=_PENDING)
sa.Index("ix_deliveries_destination", deliveries.c.tenant_id, deliveries.c.destination, deliveries.c.created_at)

delivery_attempts = sa.Table(
    "delivery_attempts",
    metadata,
    sa.Column("delivery_id", sa.ForeignKey("deliveries.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("at", UtcDateTime, nullable=False),
    sa.Column("error", JsonType),  #: NULL: it was delivered
    sa.Column("sent_bytes", sa.BigInteger, nullable=False),  #: in this attempt
    sa.Column("duration_ms", sa.BigInteger, nullable=False),
)
