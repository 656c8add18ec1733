"""The SQL engine, the declarative base and the database's clock. Every statement that changes a job stands in core/jobs/store.py."""

import datetime as dt
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import JSON, ColumnElement, DateTime, Engine, MetaData, create_engine, event, select
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.engine import Connection, Dialect, make_url
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator

from core.errors import ErrorCode, NightpressError

JsonType = JSON().with_variant(JSONB(), "postgresql")


class UtcDateTime(TypeDecorator[dt.datetime]):
    """An aware UTC datetime. SQLite keeps it as ISO text, which sorts and compares as PostgreSQL's timestamptz does."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: dt.datetime | None, dialect: Dialect) -> dt.datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a datetime without a time zone reached the database")
        value = value.astimezone(dt.UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: dt.datetime | None, _dialect: Dialect) -> dt.datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=dt.UTC) if value.tzinfo is None else value.astimezone(dt.UTC)


class db_now(FunctionElement[dt.datetime]):  # noqa: N801 - reads as an SQL function
    """The database's clock plus `seconds`: the only clock that decides about leases, deadlines and schedules."""

    type = UtcDateTime()
    inherit_cache = False

    def __init__(self, seconds: float | ColumnElement[float] = 0.0) -> None:
        self.seconds = seconds
        super().__init__(seconds) if isinstance(seconds, ColumnElement) else super().__init__()


@compiles(db_now, "postgresql")
def _now_postgresql(element: db_now, compiler: Any, **kw: Any) -> str:
    # clock_timestamp, not now(): a transaction that waited for a lock must not see the time it began to wait.
    if isinstance(element.seconds, ColumnElement):
        return f"(clock_timestamp() + ({compiler.process(element.seconds, **kw)}) * interval '1 second')"
    if element.seconds == 0:
        return "clock_timestamp()"
    return f"(clock_timestamp() + interval '{float(element.seconds):f} second')"


@compiles(db_now, "sqlite")
def _now_sqlite(element: db_now, compiler: Any, **kw: Any) -> str:
    # Microseconds padded by hand: SQLite counts milliseconds, SQLAlchemy writes six digits, and text must compare.
    if isinstance(element.seconds, ColumnElement):
        shift = f", (({compiler.process(element.seconds, **kw)}) || ' seconds')"
    else:
        shift = "" if element.seconds == 0 else f", '{float(element.seconds):+f} seconds'"
    return f"(strftime('%Y-%m-%d %H:%M:%f', 'now'{shift}) || '000')"


class Base(DeclarativeBase):
    """All tables share this metadata, so that Alembic sees them all."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_N_label)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


def make_engine(url: str, *, pool_size: int = 5) -> Engine:
    """Open a pool on SQLite (WAL, immediate transactions, foreign keys on) or PostgreSQL (psycopg 3).

    Raises NightpressError(invalid_request) for any other database.
    """
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        if parsed.database:
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(parsed, connect_args={"timeout": 10, "check_same_thread": False}, pool_size=pool_size)
        event.listen(engine, "connect", _sqlite_connect)
        event.listen(engine, "begin", _sqlite_begin)
        return engine
    if parsed.get_backend_name() == "postgresql":
        return create_engine(
            parsed.set(drivername="postgresql+psycopg"),
            pool_size=pool_size,
            max_overflow=pool_size,
            pool_timeout=5,
            pool_pre_ping=True,
            connect_args={"connect_timeout": 3},
        )
    raise NightpressError(
        ErrorCode.INVALID_REQUEST,
        f"The database {parsed.get_backend_name()} is not supported.",
        hint="Set NIGHTPRESS_DATABASE_URL to sqlite:///… or postgresql://…",
    )


def _sqlite_connect(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # SQLAlchemy's "begin" event below opens every transaction
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute("PRAGMA foreign_keys=ON")


def _sqlite_begin(connection: Connection) -> None:
    # A writer that starts as a reader fails with "database is locked" when it turns writer: say so at once instead.
    read_only = connection.get_execution_options().get("read_only", False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


@contextmanager
def transaction(engine: Engine, *, read_only: bool = False) -> Iterator[Connection]:
    """One transaction: committed at the end, rolled back on any error.

    Raises NightpressError(database_unavailable) where the database can't be reached or stays locked.
    """
    try:
        with engine.connect().execution_options(read_only=read_only) as connection, connection.begin():
            yield connection
    except OperationalError as error:
        raise NightpressError(
            ErrorCode.DATABASE_UNAVAILABLE,
            f"The database did not answer: {str(error.orig).strip()}.",
            hint="Nothing was written. Try again in a few seconds; `nightpress doctor` says what is wrong.",
        ) from error


def read_now(connection: Connection) -> dt.datetime:
    """The database's time, for Python code that must compare with it."""
    return connection.execute(select(db_now())).scalar_one()
