"""The tables of signed statements and of the public keys that check them. No private key is stored: see core/service/signing/keys.py."""

import sqlalchemy as sa

from nightpress.core.database import JsonType, UtcDateTime, metadata

#: Every key that this installation has signed with.
signing_keys = sa.Table(
    "signing_keys",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("public_key", sa.Text, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
)

#: One row for each accepted artifact. The transaction that accepts it writes the row, and the control process signs it.
attestations = sa.Table(
    "attestations",
    metadata,
    sa.Column("artifact_id", sa.ForeignKey("job_artifacts.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("bundle", JsonType),
    sa.Column("key_id", sa.ForeignKey("signing_keys.id")),
    sa.Column("signed_at", UtcDateTime),
    sa.CheckConstraint("(bundle IS NULL) = (key_id IS NULL) AND (bundle IS NULL) = (signed_at IS NULL)", name="signed"),
)
_UNSIGNED = sa.text("bundle IS NULL")
sa.Index("ix_attestations_unsigned", attestations.c.artifact_id, postgresql_where=_UNSIGNED, sqlite_where=_UNSIGNED)
