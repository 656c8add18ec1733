"""The table of API keys. A dump of it opens nothing: it holds digests only."""

from sqlalchemy import Column, String, Table

from core.database import JsonType, UtcDateTime, metadata

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(8), primary_key=True),
    Column("tenant_id", String(64), nullable=False),
    Column("name", String(200), nullable=False),
    Column("digest", String(64), nullable=False),  #: SHA-256 of the whole key: 256 random bits need no slow hash
    Column("scopes", JsonType, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime),
    Column("revoked_at", UtcDateTime),
    Column("last_used_at", UtcDateTime),
)
