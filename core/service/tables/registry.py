"""The tables of models, data sets and their uploads. Rows are kept after deletion, because jobs refer to them."""

from typing import Any

import sqlalchemy as sa

from nightpress.core.database import JsonType, UtcDateTime, metadata

_ID = sa.String(40)


def _columns_in_front() -> tuple[sa.Column[Any], ...]:
    """The first columns of models and data sets: owner, origin, and progress of fetching or verifying."""
    return (
        sa.Column("id", _ID, primary_key=True),
        sa.Column("tenant_id", sa.String(64), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("source", sa.String(16), nullable=False),
        sa.Column("server_path", sa.String(4096)),
        sa.Column("source_url", sa.String(1024)),
        sa.Column("revision", sa.String(100)),  #: the source's revision, when it is known
        sa.Column("progress", sa.Float, nullable=False, server_default=sa.text("0")),  #: of fetching or verifying
        #: the claim of the process that fetches or verifies the row, and the time when the claim expires
        sa.Column("claim_id", sa.String(40)),
        sa.Column("claim_until", UtcDateTime()),
        sa.Column("digest", sa.String(80)),
        sa.Column("size", sa.BigInteger, nullable=False),  #: bytes of all files
    )


def _columns_behind() -> tuple[sa.Column[Any], ...]:
    return (
        sa.Column("error", JsonType),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("deleted_at", UtcDateTime()),
        #: true when the files of a deleted or failed row were deleted again by the sweep
        sa.Column("swept", sa.Boolean(), nullable=False, server_default=sa.text("false")),
    )


def _checks() -> tuple[sa.CheckConstraint, ...]:
    """The constraints of both models and data sets."""
    return (
        sa.CheckConstraint("state IN ('uploading', 'fetching', 'verifying', 'ready', 'failed')", name="state"),
        sa.CheckConstraint("source IN ('upload', 'path', 's3', 'hub')", name="source"),
        sa.CheckConstraint("(source IN ('s3', 'hub')) = (source_url IS NOT NULL)", name="source_url"),
        sa.CheckConstraint("(source = 'path') = (server_path IS NOT NULL)", name="server_path"),
        sa.CheckConstraint("size >= 0", name="size"),
    )


#: A model. When it is `ready`, it is an immutable folder of files with a digest.
models = sa.Table(
    "models",
    metadata,
    *_columns_in_front(),
    sa.Column("architecture", sa.String(128)),
    sa.Column("model_type", sa.String(64)),
    sa.Column("task", sa.String(32)),
    sa.Column("parameters", sa.BigInteger),
    sa.Column("files", JsonType, nullable=False),  #: path, size, sha256 of each
    sa.Column("header", JsonType),  #: core.recipes.header.ModelHeader
    #: of an adapter: the model that it was trained for, whose files jobs get beside the adapter's; NULL: not an adapter, or not known yet
    sa.Column("base_id", sa.ForeignKey("models.id")),
    sa.Column("left_out", JsonType),  #: names beside the model that were not taken; NULL: from before this was recorded
    *_columns_behind(),
    *_checks(),
    sa.CheckConstraint("state <> 'ready' OR (digest IS NOT NULL AND parameters IS NOT NULL)", name="ready_is_whole"),
    sa.Index("ix_models_tenant_id_name_created_at_id", "tenant_id", "name", "created_at", "id"),
    sa.Index("ix_models_state_created_at", "state", "created_at"),
    sa.Index("ix_models_base_id", "base_id"),
)

#: A data set. When it is `ready`, it is one immutable file of text or rows.
data_sets = sa.Table(
    "data_sets",
    metadata,
    *_columns_in_front(),
    sa.Column("rows", sa.BigInteger),
    sa.Column("labels", sa.Integer),  #: number of different labels; 0: unlabelled
    sa.Column("files", JsonType, nullable=False),  #: path, size, sha256 of its one file
    *_columns_behind(),
    *_checks(),
    sa.CheckConstraint("state <> 'ready' OR (digest IS NOT NULL AND rows > 0)", name="ready_is_whole"),
    sa.Index("ix_data_sets_tenant_id_name_created_at_id", "tenant_id", "name", "created_at", "id"),
    sa.Index("ix_data_sets_state_created_at", "state", "created_at"),
)

#: Condition for deleted or failed rows whose files may still exist.
UNSWEPT = sa.text("NOT swept AND (deleted_at IS NOT NULL OR state = 'failed')")
for _table in (models, data_sets):
    sa.Index(f"ix_{_table.name}_unswept", _table.c.id, postgresql_where=UNSWEPT, sqlite_where=UNSWEPT)

#: A file that a client is uploading. Which parts were received is known only to the store, so that it is recorded in one place.
uploads = sa.Table(
    "uploads",
    metadata,
    sa.Column("id", _ID, primary_key=True),
    sa.Column("model_id", sa.ForeignKey("models.id", ondelete="CASCADE")),
    sa.Column("data_set_id", sa.ForeignKey("data_sets.id", ondelete="CASCADE")),
    sa.Column("path", sa.String(512), nullable=False),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("part_size", sa.BigInteger, nullable=False),
    sa.Column("part_sha256", JsonType, nullable=False),  #: of each part; empty if the client announced none
    sa.Column("store_upload_id", sa.String(1024), nullable=False),  #: the store's id of the upload
    sa.Column("verified", sa.Boolean(), nullable=False, default=False),  #: the object has the announced SHA-256
    sa.CheckConstraint("(model_id IS NULL) <> (data_set_id IS NULL)", name="one_owner"),
    sa.CheckConstraint("size > 0 AND part_size > 0", name="size"),
    sa.Index("uq_uploads_model_id_path", "model_id", "path", unique=True),
    sa.Index("uq_uploads_data_set_id_path", "data_set_id", "path", unique=True),
)
