"""The tables of models, data sets and their uploads. Rows are kept after deletion, because jobs tell their history by them."""

import datetime as dt
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Index, Integer, String
from sqlalchemy.orm import Mapped, mapped_column

from core.database import Base, JsonType, UtcDateTime

_ID = String(40)


class ModelRow(Base):
    """A model: an immutable folder of files with a digest, once it is `ready`."""

    __tablename__ = "models"
    __table_args__ = (
        CheckConstraint("state IN ('uploading', 'ready', 'failed')", name="state"),
        CheckConstraint("source IN ('upload', 'path')", name="source"),
        CheckConstraint("(source = 'path') = (server_path IS NOT NULL)", name="server_path"),
        CheckConstraint("state <> 'ready' OR (digest IS NOT NULL AND parameters IS NOT NULL)", name="ready_is_whole"),
        CheckConstraint("size >= 0", name="size"),
        Index("ix_models_tenant_id_name_id", "tenant_id", "name", "id"),
        Index("ix_models_state_created_at", "state", "created_at"),
    )

    id: Mapped[str] = mapped_column(_ID, primary_key=True)
    tenant_id: Mapped[str] = mapped_column(String(64))
    name: Mapped[str] = mapped_column(String(64))
    state: Mapped[str] = mapped_column(String(16))
    source: Mapped[str] = mapped_column(String(16))
    server_path: Mapped[str | None] = mapped_column(String(4096))
    digest: Mapped[str | None] = mapped_column(String(80))
    size: Mapped[int] = mapped_column(BigInteger)  #: bytes of all files
    architecture: Mapped[str | None] = mapped_column(String(128))
    model_type: Mapped[str | None] = mapped_column(String(64))
    task: Mapped[str | None] = mapped_column(String(32))
    parameters: Mapped[int | None] = mapped_column(BigInteger)
    files: Mapped[list[dict[str, Any]]] = mapped_column(JsonType)  #: path, size, sha256 of each
    header: Mapped[dict[str, Any] | None] = mapped_column(JsonType)  #: core.recipes.header.ModelHeader
    error: Mapped[dict[str, Any] | None] = mapped_column(JsonType)
    created_at: Mapped[dt.datetime] = mapped_column(UtcDateTime())
    deleted_at: Mapped[dt.datetime | None] = mapped_column(UtcDateTime())


class DataSetRow(Base):
    """A data set: one immutable file of text or rows, once it is `ready`."""

    __tablename__ = "data_sets"
    __table_args__ = (
        CheckConstraint("state IN ('uploading', 'ready', 'failed')", name="state"),
        CheckConstraint("source IN ('upload', 'path')", name="source"),
        CheckConstraint("(source = 'path') = (server_path IS NOT NULL)", name="server_path"),
        CheckConstraint("state <> 'ready' OR (digest IS NOT NULL AND rows > 0)", name="ready_is_whole"),
        CheckConstraint("size >= 0", name="size"),
        Index("ix_data_sets_tenant_id_name_id", "tenant_id", "name", "id"),
        Index("ix_data_sets_state_created_at", "state", "created_at"),
    )

    id: Mapped[str] = mapped_column(_ID, primary_key=True)
    tenant_id: Mapped[str] = mapped_column(String(64))
    name: Mapped[str] = mapped_column(String(64))
    state: Mapped[str] = mapped_column(String(16))
    source: Mapped[str] = mapped_column(String(16))
    server_path: Mapped[str | None] = mapped_column(String(4096))
    digest: Mapped[str | None] = mapped_column(String(80))
    size: Mapped[int] = mapped_column(BigInteger)
    rows: Mapped[int | None] = mapped_column(BigInteger)
    labels: Mapped[int | None] = mapped_column(Integer)  #: how many classes its labels name; 0: unlabelled
    files: Mapped[list[dict[str, Any]]] = mapped_column(JsonType)  #: path, size, sha256 of its one file
    error: Mapped[dict[str, Any] | None] = mapped_column(JsonType)
    created_at: Mapped[dt.datetime] = mapped_column(UtcDateTime())
    deleted_at: Mapped[dt.datetime | None] = mapped_column(UtcDateTime())


class UploadRow(Base):
    """A file that a client is uploading. Which parts have come the store knows; it is never said twice."""

    __tablename__ = "uploads"
    __table_args__ = (
        CheckConstraint("(model_id IS NULL) <> (data_set_id IS NULL)", name="one_owner"),
        CheckConstraint("size > 0 AND part_size > 0", name="size"),
        Index("uq_uploads_model_id_path", "model_id", "path", unique=True),
        Index("uq_uploads_data_set_id_path", "data_set_id", "path", unique=True),
    )

    id: Mapped[str] = mapped_column(_ID, primary_key=True)
    model_id: Mapped[str | None] = mapped_column(ForeignKey("models.id", ondelete="CASCADE"))
    data_set_id: Mapped[str | None] = mapped_column(ForeignKey("data_sets.id", ondelete="CASCADE"))
    path: Mapped[str] = mapped_column(String(512))
    size: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    part_size: Mapped[int] = mapped_column(BigInteger)
    part_sha256: Mapped[list[str]] = mapped_column(JsonType)  #: of each part, where they were announced; else empty
    store_upload_id: Mapped[str] = mapped_column(String(1024))  #: the store's name for the half-made object
    verified: Mapped[bool] = mapped_column(default=False)  #: the object is whole and has the announced SHA-256
