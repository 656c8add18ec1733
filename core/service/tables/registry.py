"""The tables of models, data sets and their uploads. Rows are kept after deletion, because jobs refer to them."""

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
    """The first columns of models and data sets: owner, origin, and progress of fetching or verifying."""
    return (
        Column("id", _ID, primary_key=True),
        Column("tenant_id", String(64), nullable=False),
        Column("name", String(64), nullable=False),
        Column("state", String(16), nullable=False),
        Column("source", String(16), nullable=False),
        Column("server_path", String(4096)),
        Column("source_url", String(1024)),
        Column("revision", String(100)),  #: the source's revision, when it is known
        Column("progress", Float, nullable=False, server_default=text("0")),  #: of fetching or verifying
        #: the claim of the process that fetches or verifies the row, and the time when the claim expires
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
        #: true when the files of a deleted or failed row were deleted again by the sweep
        Column("swept", Boolean(), nullable=False, server_default=text("false")),
    )


def _checks() -> tuple[CheckConstraint, ...]:
    """The constraints of both models and data sets."""
    return (
        CheckConstraint("state IN ('uploading', 'fetching', 'verifying', 'ready', 'failed')", name="state"),
        CheckConstraint("source IN ('upload', 'path', 's3', 'hub')", name="source"),
        CheckConstraint("(source IN ('s3', 'hub')) = (source_url IS NOT NULL)", name="source_url"),
        CheckConstraint("(source = 'path') = (server_path IS NOT NULL)", name="server_path"),
        CheckConstraint("size >= 0", name="size"),
    )


#: A model. When it is `ready`, it is an immutable folder of files with a digest.
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
    #: of an adapter: the model that it was trained for, whose files jobs get beside the adapter's; NULL: not an adapter, or not known yet
    Column("base_id", ForeignKey("models.id")),
    Column("left_out", JsonType),  #: names beside the model that were not taken; NULL: from before this was recorded
    *_columns_behind(),
    *_checks(),
    CheckConstraint("state <> 'ready' OR (digest IS NOT NULL AND parameters IS NOT NULL)", name="ready_is_whole"),
    Index("ix_models_tenant_id_name_created_at_id", "tenant_id", "name", "created_at", "id"),
    Index("ix_models_state_created_at", "state", "created_at"),
    Index("ix_models_base_id", "base_id"),
)

#: A data set. When it is `ready`, it is one immutable file of text or rows.
data_sets = Table(
    "data_sets",
    metadata,
    *_columns_in_front(),
    Column("rows", BigInteger),
    Column("labels", Integer),  #: number of different labels; 0: unlabelled
    Column("files", JsonType, nullable=False),  #: path, size, sha256 of its one file
    *_columns_behind(),
    *_checks(),
    CheckConstraint("state <> 'ready' OR (digest IS NOT NULL AND rows > 0)", name="ready_is_whole"),
    Index("ix_data_sets_tenant_id_name_created_at_id", "tenant_id", "name", "created_at", "id"),
    Index("ix_data_sets_state_created_at", "state", "created_at"),
)

#: Condition for deleted or failed rows whose files may still exist.
UNSWEPT = text("NOT swept AND (deleted_at IS NOT NULL OR state = 'failed')")
for _table in (models, data_sets):
    Index(f"ix_{_table.name}_unswept", _table.c.id, postgresql_where=UNSWEPT, sqlite_where=UNSWEPT)

#: A file that a client is uploading. Which parts were received is known only to the store, so that it is recorded in one place.
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
    Column("part_sha256", JsonType, nullable=False),  #: of each part; empty if the client announced none
    Column("store_upload_id", String(1024), nullable=False),  #: the store's id of the upload
    Column("verified", Boolean(), nullable=False, default=False),  #: the object has the announced SHA-256
    CheckConstraint("(model_id IS NULL) <> (data_set_id IS NULL)", name="one_owner"),
    CheckConstraint("size > 0 AND part_size > 0", name="size"),
    Index("uq_uploads_model_id_path", "model_id", "path", unique=True),
    Index("uq_uploads_data_set_id_path", "data_set_id", "path", unique=True),
)
