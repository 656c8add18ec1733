"""The table of promotions: which job's artifacts are the latest of a model's name. Rows are only added; the newest row counts."""

from sqlalchemy import CheckConstraint, Column, ForeignKey, Index, String, Table

from nightpress.core.database import UtcDateTime, metadata

promotions = Table(
    "promotions",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("tenant_id", String(64), nullable=False),
    Column("model_name", String(64), nullable=False),
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("cause", String(12), nullable=False),  #: accepted: when a job was accepted; manual: by a user
    Column("created_by", String(8)),
    Column("created_at", UtcDateTime, nullable=False),
    CheckConstraint("cause IN ('accepted','manual')", name="cause"),
)
Index(
    "ix_promotions_latest",
    promotions.c.tenant_id,
    promotions.c.model_name,
    promotions.c.created_at,
    promotions.c.id,
)
