"""The table of promotions: which job's artifacts are the latest of a model's name. Rows are only added; the newest row counts."""

import sqlalchemy as sa

from nightpress.core.database import UtcDateTime, metadata

promotions = sa.Table(
    "promotions",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("tenant_id", sa.String(64), nullable=False),
    sa.Column("model_name", sa.String(64), nullable=False),
    sa.Column("job_id", sa.ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False, index=True),
    sa.Column("cause", sa.String(12), nullable=False),  #: accepted: when a job was accepted; manual: by a user
    sa.Column("created_by", sa.String(8)),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.CheckConstraint("cause IN ('accepted','manual')", name="cause"),
)
sa.Index(
    "ix_promotions_latest",
    promotions.c.tenant_id,
    promotions.c.model_name,
    promotions.c.created_at,
    promotions.c.id,
)
