"""The tables of signed statements and of the public keys that check them. No private key is stored: see core/service/signing/keys.py."""

from sqlalchemy import CheckConstraint, Column, ForeignKey, Index, String, Table, Text, text

from nightpress.core.database import JsonType, UtcDateTime, metadata

#: Every key that this installation has signed with.
signing_keys = Table(
    "signing_keys",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("public_key", Text, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
)

#: One row for each accepted artifact. The transaction that accepts it writes the row, and the control process signs it.
attestations = Table(
    "attestations",
    metadata,
    Column("artifact_id", ForeignKey("job_artifacts.id", ondelete="CASCADE"), primary_key=True),
    Column("bundle", JsonType),
    Column("key_id", ForeignKey("signing_keys.id")),
    Column("signed_at", UtcDateTime),
    CheckConstraint("(bundle IS NULL) = (key_id IS NULL) AND (bundle IS NULL) = (signed_at IS NULL)", name="signed"),
)
_UNSIGNED = text("bundle IS NULL")
Index("ix_attestations_unsigned", attestations.c.artifact_id, postgresql_where=_UNSIGNED, sqlite_where=_UNSIGNED)
