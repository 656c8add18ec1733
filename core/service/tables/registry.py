"""The tables of models, data sets and their uploads. Rows are kept after deletion, because jobs tell their history by them."""

from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    String,
    Table,
    text,
)

from nightpress.core.database import JsonType, UtcDateTime, metadata

_ID = String(40)


def _columns_in_front() -> tuple[Column[Any], ...]:
    """What models and data sets have in common: whose they are, where they come from, and how far they are taken in."""
    return (
        Column("id", _ID, primary_key=True),
        Column("tenant_id", String(64), nullable=False),
        Column("name", String(64), nullable=False),
        Column("state", String(16), nullable=False),
        Column("source", String(16), nullable=False),
        Column("server_path", String(4096)),
        Column("source_url", String(1024)),
        Column("revision", String(100)),  #: of the source, once it is known
        Column("progress", Float, nullable=False, server_default=text("0")),  #: of fetching or verifying
        #: whose it is while it is taken in, and until when; the next one may have it then
        Column("claim_id", String(40)),
        Column("claim_until", UtcDateTime()),
        Column("digest", String(80)),
        Column("size", BigInteger, nullable=False),  #: bytes of all files
    )


def _columns_behind() -> tuple[Column[Any], ...]:
    return (
        Column("error", JsonType),
        Column("created_at", UtcDateTime(), nullable=False),
        Column("deleted_at", UtcDateTime()),
        Column(
            "swept", Boolean(), nullable=False, server_default=text("false")
        ),  #: once it is over: its files are surely gone
    )


def _checks() -> tuple[CheckConstraint, ...]:
    """What holds for models and data sets alike."""
    return (
        CheckConstraint("state IN ('uploading', 'fetching', 'verifying', 'ready', 'failed')", name="state"),
        CheckConstraint("source IN ('upload', 'path', 's3', 'hub')", name="source"),
        CheckConstraint("(source IN ('s3', 'hub')) = (source_url IS NOT NULL)", name="source_url"),
        CheckConstraint("(source = 'path') = (server_path IS NOT NULL)", name="server_path"),
        CheckConstraint("size >= 0", name="size"),
    )


#: A model: an immutable folder of files with a digest, once it is `ready`.
models = Table(
    "models",
    metadata,
    *_columns_in_front(),
    Column("architecture", String(128)),
    Column("model_type", String(64)),
    Column("task", String(32)),
    Column("parameters", BigInteger),
    Column("files", JsonType, nullable=False),  #: path, size, sha256 of each
    Column("header", JsonType),  #: core.recipes.header.ModelHeader
    *_columns_behind(),
    *_checks(),
    CheckConstraint("state <> 'ready' OR (digest IS NOT NULL AND parameters IS NOT NULL)", name="ready_is_whole"),
    Index("ix_models_tenant_id_name_created_at_id", "tenant_id", "name", "created_at", "id"),
    Index("ix_models_state_created_at", "state", "created_at"),
)

#: A data set: one immutable file of text or rows, once it is `ready`.
data_sets = Table(
    "data_sets",
    metadata,
    *_columns_in_front(),
    Column("rows", BigInteger),
    Column("labels", Integer),  #: how many classes its labels name; 0: unlabelled
    Column("files", JsonType, nullable=False),  #: path, size, sha256 of its one file
    *_columns_behind(),
    *_checks(),
    CheckConstraint("state <> 'ready' OR (digest IS NOT NULL AND rows > 0)", name="ready_is_whole"),
    Index("ix_data_sets_tenant_id_name_created_at_id", "tenant_id", "name", "created_at", "id"),
    Index("ix_data_sets_state_created_at", "state", "created_at"),
)

#: Over, but its files may still be there.
UNSWEPT = text("NOT swept AND (deleted_at IS NOT NULL OR state = 'failed')")
for _table in (models, data_sets):
    Index(f"ix_{_table.name}_unswept", _table.c.id, postgresql_where=UNSWEPT, sqlite_where=UNSWEPT)

#: A file that a client is uploading. Which parts have come the store knows; it is never said twice.
uploads = Table(
    "uploads",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("model_id", ForeignKey("models.id", ondelete="CASCADE")),
    Column("data_set_id", ForeignKey("data_sets.id", ondelete="CASCADE")),
    Column("path", String(512), nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("part_size", BigInteger, nullable=False),
    Column("part_sha256", JsonType, nullable=False),  #: of each part, where they were announced; else empty
    Column("store_upload_id", String(1024), nullable=False),  #: the store's name for the half-made object
    Column("verified", Boolean(), nullable=False, default=False),  #: the object is whole and has the announced SHA-256
    CheckConstraint("(model_id IS NULL) <> (data_set_id IS NULL)", name="one_owner"),
    CheckConstraint("size > 0 AND part_size > 0", name="size"),
    Index("uq_uploads_model_id_path", "model_id", "path", unique=True),
    Index("uq_uploads_data_set_id_path", "data_set_id", "path", unique=True),
)
