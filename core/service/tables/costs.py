"""The table of what tenants have spent. The cost of an attempt stands in `job_attempts.cost_micros`."""

from sqlalchemy import BigInteger, CheckConstraint, Column, String, Table

from nightpress.core.database import metadata

#: Money in millionths of the currency. Written in the transaction that writes the attempts' costs.
spending = Table(
    "spending",
    metadata,
    Column("tenant_id", String(64), primary_key=True),
    Column("day", String(10), primary_key=True),  #: e.g. 2026-11-29, in UTC, when the attempts ended
    Column("micros", BigInteger, nullable=False),
    CheckConstraint("micros >= 0", name="micros"),
)
