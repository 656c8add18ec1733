"""The tables of tenants, API keys and the audit log. They hold only digests of keys, so that a dump gives no access."""

import sqlalchemy as sa

from nightpress.core.database import JsonType, UtcDateTime, metadata

#: A tenant is just the name in its keys. It has a row only if it has its own quotas.
tenants = sa.Table(
    "tenants",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("max_queued_jobs", sa.Integer),
    sa.Column("max_running_jobs", sa.Integer),
    sa.Column("max_storage_bytes", sa.BigInteger),
    sa.Column("max_gpu_seconds_month", sa.BigInteger),
    sa.Column("rate_limit_per_minute", sa.Integer),
    sa.Column("max_cost_day", sa.BigInteger),  #: in the operator's currency
    sa.Column("max_cost_month", sa.BigInteger),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.CheckConstraint(
        "max_queued_jobs >= 0 AND max_running_jobs >= 0 AND max_storage_bytes >= 0"
        " AND max_gpu_seconds_month >= 0 AND rate_limit_per_minute >= 0",
        name="quotas",
    ),
)

api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", sa.String(8), primary_key=True),
    sa.Column("tenant_id", sa.String(64), nullable=False),
    sa.Column("name", sa.String(200), nullable=False),
    sa.Column("digest", sa.String(64), nullable=False),  #: SHA-256 of the whole key; 256 random bits need no slow hash
    sa.Column("scopes", JsonType, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("expires_at", UtcDateTime),
    sa.Column("revoked_at", UtcDateTime),
    sa.Column("last_used_at", UtcDateTime),
    sa.Column("rotated_from", sa.String(8)),
    sa.Column("made_by", sa.String(8)),  #: the key that made this key; revoking it also revokes this key
    sa.Column("family", sa.String(8)),  #: the first key of the chain that made this key; None: this key
    sa.Index("ix_api_keys_tenant_id_created_at", "tenant_id", "created_at"),
    sa.Index("ix_api_keys_made_by", "made_by"),
)

#: GPU time of attempts, added when each ends. The monthly quota is compared with it.
gpu_usage = sa.Table(
    "gpu_usage",
    metadata,
    sa.Column("tenant_id", sa.String(64), primary_key=True),
    sa.Column("month", sa.String(7), primary_key=True),  #: e.g. 2026-11, in UTC
    sa.Column("seconds", sa.Float, nullable=False),
    sa.CheckConstraint("seconds >= 0", name="seconds"),
)

#: Who did what. Triggers in the database refuse to change a row, or to delete a row younger than 30 days.
audit_log = sa.Table(
    "audit_log",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("at", UtcDateTime, nullable=False),
    sa.Column("tenant_id", sa.String(64), nullable=False),
    sa.Column("key_id", sa.String(8), nullable=False),
    sa.Column("action", sa.String(200), nullable=False),  #: method and route
    sa.Column("subject", sa.String(1024), nullable=False),  #: the path of the request
    sa.Column("status", sa.Integer, nullable=False),
    sa.Column("request_id", sa.String(64), nullable=False),
    sa.Index("ix_audit_log_tenant_id_at_id", "tenant_id", "at", "id"),
    sa.Index("ix_audit_log_at_id", "at", "id"),
)

#: People who have signed in by OIDC. Their id stands where a key's id stands: in the audit log, in jobs, in idempotency.
people = sa.Table(
    "people",
    metadata,
    sa.Column("id", sa.String(8), primary_key=True),  #: begins with a capital letter, which no key's id does
    sa.Column("issuer", sa.String(512), nullable=False),
    sa.Column("subject", sa.String(255), nullable=False),
    sa.Column("name", sa.String(200), nullable=False),
    sa.Column("email", sa.String(320), nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("seen_at", UtcDateTime, nullable=False),
    sa.UniqueConstraint("issuer", "subject"),
)

SESSION_LIVES = sa.text("ended_at IS NULL")

#: Sessions of the page. Its cookie is not stored, only a digest of it.
sessions = sa.Table(
    "sessions",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("person_id", sa.String(8), sa.ForeignKey("people.id", ondelete="CASCADE"), nullable=False),
    sa.Column("tenant_id", sa.String(64), nullable=False),
    sa.Column("groups", JsonType, nullable=False),  #: those that the setting OIDC_GROUPS names
    sa.Column("digest", sa.String(64), nullable=False, unique=True),  #: SHA-256 of the cookie
    sa.Column(
        "state_digest", sa.String(64), nullable=False, unique=True
    ),  #: of the sign-in, which makes one session only
    sa.Column("refresh_token", sa.Text),  #: encrypted with the installation's key
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("seen_at", UtcDateTime, nullable=False),
    sa.Column("confirmed_at", UtcDateTime, nullable=False),  #: when the provider last confirmed the groups
    sa.Column("check_at", UtcDateTime, nullable=False),  #: when they are asked for again
    sa.Column("ends_at", UtcDateTime, nullable=False),
    sa.Column("ended_at", UtcDateTime),
    sa.Column("reason", sa.String(16)),
    sa.CheckConstraint("(ended_at IS NULL) = (reason IS NULL)", name="reason"),
    sa.CheckConstraint("reason IN ('signed_out','revoked','expired','no_group','refused')", name="reason_value"),
    sa.Index("ix_sessions_check_at", "check_at", postgresql_where=SESSION_LIVES, sqlite_where=SESSION_LIVES),
    sa.Index("ix_sessions_tenant_id_created_at", "tenant_id", "created_at"),
    sa.Index("ix_sessions_person_id", "person_id"),
)
