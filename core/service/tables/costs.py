"""The table of what tenants have spent. The cost of an attempt stands in `job_attempts.cost_micros`."""

import sqlalchemy as sa

from nightpress.core.database import metadata

#: Money in millionths of the currency. Written in the transaction that writes the attempts' costs.
spending = sa.Table(
    "spending",
    metadata,
    sa.Column("tenant_id", sa.String(64), primary_key=True),
    sa.Column("day", sa.String(10), primary_key=True),  #: e.g. 2026-11-29, in UTC, when the attempts ended
    sa.Column("micros", sa.BigInteger, nullable=False),
    sa.CheckConstraint("micros >= 0", name="micros"),
)
