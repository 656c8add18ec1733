"""The SQL engine, the metadata of all tables and the database's clock. The statements that change jobs are in core/service/jobs."""

import datetime as dt
import hashlib
import json
import math
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    ColumnElement,
    DateTime,
    Engine,
    Float,
    MetaData,
    Select,
    String,
    create_engine,
    event,
    func,
    literal,
    select,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.engine import Connection, Dialect, make_url
from sqlalchemy.exc import (
    DataError,
    DBAPIError,
    IntegrityError,
    InvalidatePoolError,
    NotSupportedError,
    ProgrammingError,
    SQLAlchemyError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator

from nightpress.core.errors import ErrorCode, NightpressError

#: Python's None is stored as SQL's NULL, not as JSON's null, so that constraints can test `IS NULL`.
JsonType = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")


_PING_AFTER_S = 2.0
_LOCK_WAIT_S = 10.0


class UtcDateTime(TypeDecorator[dt.datetime]):
    """A time-zone-aware UTC datetime. SQLite stores it as ISO text, which sorts and compares as PostgreSQL's timestamptz does."""

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
    """The time of the database's clock plus `seconds`. Only this clock decides about leases, deadlines and schedules."""

    type = UtcDateTime()
    inherit_cache = True

    def __init__(self, seconds: float | ColumnElement[Any] = 0.0) -> None:
        if isinstance(seconds, ColumnElement):
            super().__init__(seconds)
        elif seconds:
            super().__init__(literal(float(seconds), Float))
        else:
            super().__init__()


@compiles(db_now, "postgresql")
def _now_postgresql(element: db_now, compiler: Any, **kw: Any) -> str:
    # clock_timestamp() and not now(): now() is the time when the transaction began, which is too early after a wait for a lock.
    shifts = [compiler.process(seconds, **kw) for seconds in element.clauses]
    return f"(clock_timestamp() + ({shifts[0]}) * interval '1 second')" if shifts else "clock_timestamp()"


@compiles(db_now, "sqlite")
def _now_sqlite(element: db_now, compiler: Any, **kw: Any) -> str:
    # SQLite writes milliseconds and SQLAlchemy writes microseconds. Pad to six digits, because the two are compared as text.
    shifts = [f", (({compiler.process(seconds, **kw)}) || ' seconds')" for seconds in element.clauses]
    return f"(strftime('%Y-%m-%d %H:%M:%f', 'now'{''.join(shifts)}) || '000')"


class db_month(FunctionElement[str]):  # noqa: N801 - reads as an SQL function
    """The calendar month of the database's clock in UTC, e.g. 2026-11."""

    type = String(7)
    inherit_cache = True


@compiles(db_month, "postgresql")
def _month_postgresql(_element: db_month, _compiler: Any, **_kw: Any) -> str:
    return "to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM')"


@compiles(db_month, "sqlite")
def _month_sqlite(_element: db_month, _compiler: Any, **_kw: Any) -> str:
    return "strftime('%Y-%m', 'now')"


class db_day(FunctionElement[str]):  # noqa: N801 - reads as an SQL function
    """The day of the database's clock in UTC, e.g. 2026-11-29."""

    type = String(10)
    inherit_cache = True


@compiles(db_day, "postgresql")
def _day_postgresql(_element: db_day, _compiler: Any, **_kw: Any) -> str:
    return "to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD')"


@compiles(db_day, "sqlite")
def _day_sqlite(_element: db_day, _compiler: Any, **_kw: Any) -> str:
    return "strftime('%Y-%m-%d', 'now')"


#: Every table uses this object, so that Alembic finds all tables.
metadata = MetaData(
    naming_convention={
        "ix": "ix_%(column_0_N_label)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def make_engine(url: str, *, pool_size: int = 5, lock_wait_s: float = _LOCK_WAIT_S) -> Engine:
    """Open a pool on SQLite (WAL, immediate transactions, foreign keys on) or PostgreSQL (psycopg 3).

    On both databases, a statement waits up to `lock_wait_s` seconds for a lock of another connection. Then it fails with
    database_unavailable. Raises NightpressError(invalid_request) for any other kind of database.
    """
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        if parsed.database:
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(
            parsed,
            connect_args={"timeout": lock_wait_s, "check_same_thread": False},
            pool_size=pool_size,
            json_serializer=_dump_json,
        )
        event.listen(engine, "connect", _sqlite_connect)
        event.listen(engine, "begin", _sqlite_begin)
        return engine
    if parsed.get_backend_name() == "postgresql":
        engine = create_engine(
            parsed.set(drivername="postgresql+psycopg"),
            pool_size=pool_size,
            max_overflow=pool_size,
            pool_timeout=5,
            connect_args={"connect_timeout": 3, "tcp_user_timeout": 10_000},
            json_serializer=_dump_json,
        )
        event.listen(engine, "connect", partial(_bound_lock_waits, lock_wait_s))
        event.listen(engine, "checkin", _note_checkin)
        event.listen(engine, "checkout", _ping_idle)
        return engine
    raise NightpressError(
        ErrorCode.INVALID_REQUEST,
        f"The database {parsed.get_backend_name()} is not supported.",
        hint="Set NIGHTPRESS_DATABASE_URL to sqlite:///… or postgresql://…",
    )


def clean_text(text: str) -> str:
    """Replace the characters that PostgreSQL refuses: NUL and lone surrogates."""
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode()


def _cleaned(value: Any) -> Any:
    """Replace the values that PostgreSQL's JSON refuses: text is cleaned, and numbers that are not finite become null."""
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {_cleaned(key): _cleaned(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_cleaned(item) for item in value]
    return value


def _dump_json(value: Any) -> str:
    return json.dumps(_cleaned(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _bound_lock_waits(seconds: float, connection: Any, _record: object) -> None:
    # Set by a statement: connection poolers refuse options in the startup packet.
    connection.execute(f"SET lock_timeout = {int(seconds * 1000)}")
    connection.commit()


def _note_checkin(_connection: object, record: ConnectionPoolEntry) -> None:
    record.info["idle_since"] = time.monotonic()


def _ping_idle(connection: Any, record: ConnectionPoolEntry, _proxy: object) -> None:
    """Test a connection that was idle for `_PING_AFTER_S` seconds or longer. Testing a busy connection would only cost a round trip.

    After a restart of the server, one statement of a busy process fails on a dead connection. SQLAlchemy then discards the whole pool.
    """
    if time.monotonic() - record.info.get("idle_since", math.inf) < _PING_AFTER_S:
        return
    import psycopg  # imported here, so that processes on SQLite do not load the driver

    try:
        connection.execute("SELECT 1")
        connection.rollback()
    except psycopg.Error as error:
        raise InvalidatePoolError from error


def _sqlite_connect(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # SQLAlchemy's "begin" event below opens every transaction
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute("PRAGMA foreign_keys=ON")


def _sqlite_begin(connection: Connection) -> None:
    # A transaction that reads first and writes later can fail at once with "database is locked". Take the write lock at the start instead.
    read_only = connection.get_execution_options().get("read_only", False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


@contextmanager
def transaction(engine: Engine, *, read_only: bool = False, lock_wait_s: float | None = None) -> Iterator[Connection]:
    """One transaction: committed at the end, rolled back on any error.

    Its statements wait up to `lock_wait_s` seconds for locks; None: as long as the engine's setting.
    Raises NightpressError(database_unavailable) if the database can't be reached or stays locked.
    """
    with _connected(engine, read_only=read_only, autocommit=read_only, lock_wait_s=lock_wait_s) as connection:
        if lock_wait_s is not None and engine.dialect.name == "postgresql":
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = {round(lock_wait_s * 1000)}")
        yield connection


@contextmanager
def statement(engine: Engine) -> Iterator[Connection]:
    """A connection for a single statement, which is its own transaction. On PostgreSQL this saves the round trips of BEGIN and COMMIT."""
    with _connected(engine, read_only=False, autocommit=True) as connection:
        yield connection


@contextmanager
def _connected(
    engine: Engine, *, read_only: bool, autocommit: bool, lock_wait_s: float | None = None
) -> Iterator[Connection]:
    options: dict[str, Any] = {"read_only": read_only}
    if autocommit and engine.dialect.name == "postgresql":
        options["isolation_level"] = "AUTOCOMMIT"
    try:
        with (
            engine.connect().execution_options(**options) as connection,
            _sqlite_waits(connection, lock_wait_s),
            connection.begin(),
        ):
            yield connection
    except (DBAPIError, PoolTimeout, InvalidatePoolError) as error:
        if isinstance(error, _OUR_FAULTS):
            raise
        raise unavailable(error) from error


@contextmanager
def _sqlite_waits(connection: Connection, seconds: float | None) -> Iterator[None]:
    """Set how long SQLite waits for a lock within the block. None keeps the engine's setting. Enter it before a transaction begins."""
    if seconds is None or connection.dialect.name != "sqlite":
        yield
        return
    raw: Any = connection.connection.dbapi_connection
    (usual,) = raw.execute("PRAGMA busy_timeout").fetchone()
    raw.execute(f"PRAGMA busy_timeout = {round(seconds * 1000)}")
    try:
        yield
    finally:
        raw.execute(f"PRAGMA busy_timeout = {usual}")


#: These errors mean that a statement of ours was wrong. Every other error comes from the server, the file or the network.
_OUR_FAULTS = (DataError, IntegrityError, NotSupportedError, ProgrammingError)

_NOT_WRITABLE = "can be read, but not written"


def unavailable(error: SQLAlchemyError) -> NightpressError:
    """Translate a database's failure: a full disk, a damaged file, no permission to write, or no answer."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    name = getattr(cause, "sqlite_errorname", "")
    state = getattr(cause, "sqlstate", None) or ""
    if name == "SQLITE_FULL" or state == "53100":
        said, hint = _NOT_WRITABLE, "Its disk is full: make room there. Nothing was written."
    elif name.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT")) or state in {"XX001", "XX002"}:
        said, hint = "is damaged", "Stop the service and restore a backup; docs/how-to/backup.md says how."
    elif name.startswith("SQLITE_READONLY") or state == "25006":
        said, hint = _NOT_WRITABLE, "Is it a standby, or are its file and folder read-only to this user?"
    else:
        said, hint = (
            "did not answer",
            "Nothing was written. Try again in a few seconds; `nightpress doctor` says what is wrong.",
        )
    details = {} if said == "did not answer" else {"said": said}
    return NightpressError(
        ErrorCode.DATABASE_UNAVAILABLE, f"The database {said}: {str(cause).strip()}.", hint=hint, **details
    )


def lock_until_commit(connection: Connection, name: str) -> None:
    """Take the lock of this name and hold it until the transaction ends. On SQLite nothing is needed: writers exclude each other."""
    if connection.dialect.name == "postgresql":
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], signed=True)
        connection.execute(select(func.pg_advisory_xact_lock(key)))


def later_than(connection: Connection, newest: Select[Any]) -> dt.datetime:
    """The database's time; if that is not later than `newest` (the clock stood still or was set back), a microsecond after `newest`."""
    now: dt.datetime
    now, last = connection.execute(select(db_now(), newest.scalar_subquery())).one()
    return now if last is None or last < now else last + dt.timedelta(microseconds=1)


def read_now(connection: Connection) -> dt.datetime:
    """The database's time, for comparisons in Python code."""
    return connection.execute(select(db_now())).scalar_one()
