"""Checks whether the database is ready: it answers, its tables are migrated, and it accepts writes."""

import threading
import time

from sqlalchemy import inspect, text

from nightpress.core.database import make_engine, transaction
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.migrations import newest

_LOCK_WAIT_S = 1.0
_WRITE_EVERY_S = 1.0


class DatabaseProbe:
    """Probes the database with a read, and with a write that changes nothing: a read does not detect a full disk, a standby or a lock.

    It has its own connection with short waits. It writes at most once a second, however often it is called.
    """

    def __init__(self, sql_url: str) -> None:
        self._engine = make_engine(sql_url, pool_size=1, lock_wait_s=_LOCK_WAIT_S)
        self._lock = threading.Lock()
        self._written_at = float("-inf")

    def ask(self) -> None:
        """Probe once. Raises NightpressError(database_unavailable); its detail `said` is a short text for callers without a key."""
        with self._lock:
            self._read()
            if time.monotonic() - self._written_at >= _WRITE_EVERY_S:
                self._write()
                self._written_at = time.monotonic()

    def close(self) -> None:
        self._engine.dispose()

    def _read(self) -> None:
        """Read the revision. A newer revision than this code knows is accepted: migrations keep older code working."""
        with transaction(self._engine, read_only=True) as connection:
            migrated = inspect(connection).has_table("alembic_version")
            query = text("SELECT max(version_num) FROM alembic_version")
            found = connection.execute(query).scalar() if migrated else None
        if found is None or found < newest():
            raise NightpressError(
                ErrorCode.DATABASE_UNAVAILABLE,
                f"The database is at revision {found or 'none'}; this version needs {newest()}.",
                hint="Run `python -m nightpress.migrations upgrade` with the same settings.",
                said="is not migrated",
            )

    def _write(self) -> None:
        try:
            with transaction(self._engine) as connection:
                connection.execute(text("UPDATE alembic_version SET version_num = version_num"))
        except NightpressError as error:
            said = {"said": "can be read, but not written"} | error.details
            raise NightpressError(error.code, error.message, hint=error.hint, **said) from error
