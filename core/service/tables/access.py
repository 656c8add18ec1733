"""The tables of tenants, API keys and the audit log. They hold only digests of keys, so that a dump gives no access."""

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

from nightpress.core.database import JsonType, UtcDateTime, metadata

#: A tenant is just the name in its keys. It has a row only if it has its own quotas.
tenants = Table(
    "tenants",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("max_queued_jobs", Integer),
    Column("max_running_jobs", Integer),
    Column("max_storage_bytes", BigInteger),
    Column("max_gpu_seconds_month", BigInteger),
    Column("rate_limit_per_minute", Integer),
    Column("max_cost_day", BigInteger),  #: in the operator's currency
    Column("max_cost_month", BigInteger),
    Column("version", Integer, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    CheckConstraint(
        "max_queued_jobs >= 0 AND max_running_jobs >= 0 AND max_storage_bytes >= 0"
        " AND max_gpu_seconds_month >= 0 AND rate_limit_per_minute >= 0",
        name="quotas",
    ),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(8), primary_key=True),
    Column("tenant_id", String(64), nullable=False),
    Column("name", String(200), nullable=False),
    Column("digest", String(64), nullable=False),  #: SHA-256 of the whole key; 256 random bits need no slow hash
    Column("scopes", JsonType, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime),
    Column("revoked_at", UtcDateTime),
    Column("last_used_at", UtcDateTime),
    Column("rotated_from", String(8)),
    Column("made_by", String(8)),  #: the key that made this key; revoking it also revokes this key
    Column("family", String(8)),  #: the first key of the chain that made this key; None: this key
    Index("ix_api_keys_tenant_id_created_at", "tenant_id", "created_at"),
    Index("ix_api_keys_made_by", "made_by"),
)

#: GPU time of attempts, added when each ends. The monthly quota is compared with it.
gpu_usage = Table(
    "gpu_usage",
    metadata,
    Column("tenant_id", String(64), primary_key=True),
    Column("month", String(7), primary_key=True),  #: e.g. 2026-11, in UTC
    Column("seconds", Float, nullable=False),
    CheckConstraint("seconds >= 0", name="seconds"),
)

#: Who did what. Triggers in the database refuse to change a row, or to delete a row younger than 30 days.
audit_log = Table(
    "audit_log",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("at", UtcDateTime, nullable=False),
    Column("tenant_id", String(64), nullable=False),
    Column("key_id", String(8), nullable=False),
    Column("action", String(200), nullable=False),  #: method and route
    Column("subject", String(1024), nullable=False),  #: the path of the request
    Column("status", Integer, nullable=False),
    Column("request_id", String(64), nullable=False),
    Index("ix_audit_log_tenant_id_at_id", "tenant_id", "at", "id"),
    Index("ix_audit_log_at_id", "at", "id"),
)

#: People who have signed in by OIDC. Their id stands where a key's id stands: in the audit log, in jobs, in idempotency.
people = Table(
    "people",
    metadata,
    Column("id", String(8), primary_key=True),  #: begins with a capital letter, which no key's id does
    Column("issuer", String(512), nullable=False),
    Column("subject", String(255), nullable=False),
    Column("name", String(200), nullable=False),
    Column("email", String(320), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("seen_at", UtcDateTime, nullable=False),
    UniqueConstraint("issuer", "subject"),
)

SESSION_LIVES = text("ended_at IS NULL")

#: Sessions of the page. Its cookie is not stored, only a digest of it.
sessions = Table(
    "sessions",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("person_id", String(8), ForeignKey("people.id", ondelete="CASCADE"), nullable=False),
    Column("tenant_id", String(64), nullable=False),
    Column("groups", JsonType, nullable=False),  #: those that the setting OIDC_GROUPS names
    Column("digest", String(64), nullable=False, unique=True),  #: SHA-256 of the cookie
    Column("state_digest", String(64), nullable=False, unique=True),  #: of the sign-in, which makes one session only
    Column("refresh_token", Text),  #: encrypted with the installation's key
    Column("created_at", UtcDateTime, nullable=False),
    Column("seen_at", UtcDateTime, nullable=False),
    Column("confirmed_at", UtcDateTime, nullable=False),  #: when the provider last confirmed the groups
    Column("check_at", UtcDateTime, nullable=False),  #: when they are asked for again
    Column("ends_at", UtcDateTime, nullable=False),
    Column("ended_at", UtcDateTime),
    Column("reason", String(16)),
    CheckConstraint("(ended_at IS NULL) = (reason IS NULL)", name="reason"),
    CheckConstraint("reason IN ('signed_out','revoked','expired','no_group','refused')", name="reason_value"),
    Index("ix_sessions_check_at", "check_at", postgresql_where=SESSION_LIVES, sqlite_where=SESSION_LIVES),
    Index("ix_sessions_tenant_id_created_at", "tenant_id", "created_at"),
    Index("ix_sessions_person_id", "person_id"),
)
