"""Alembic's environment: one connection and one transaction, and on PostgreSQL no long wait for a lock."""

import importlib
import pkgutil
from typing import Any

from alembic import context
from sqlalchemy import text
from sqlalchemy.engine import Connection

from nightpress.core.database import make_engine, metadata
from nightpress.core.service import tables
from nightpress.core.settings import load_settings

for module in pkgutil.iter_modules(tables.__path__, f"{tables.__name__}."):
    importlib.import_module(module.name)  # adds its tables to the metadata

_LOCK_KEY = 7_126_001  #: key of the advisory lock that lets migrations wait for each other; the number is arbitrary


def _url() -> str:
    given = context.config.attributes.get("url") or context.get_x_argument(as_dictionary=True).get("url")
    return given or load_settings().sql_url


def run() -> None:
    engine = make_engine(_url(), pool_size=1)
    try:
        with engine.connect() as connection:
            if connection.dialect.name == "sqlite":
                # On SQLite, a constraint is changed by creating the table again. With foreign keys on, dropping the old table would
                # delete the rows of tables that refer to it.
                driver: Any = connection.connection.driver_connection
                driver.execute("PRAGMA foreign_keys=OFF")
            with connection.begin():
                _migrate(connection)
    finally:
        engine.dispose()


def _migrate(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        # An ALTER that waits for a long query blocks every later query. It is better to fail and try again.
        connection.execute(text("SET LOCAL lock_timeout = '5s'"))
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK_KEY})
    context.configure(
        connection=connection,
        target_metadata=metadata,
        render_as_batch=connection.dialect.name == "sqlite",
        compare_server_default=True,
        user_module_prefix="nightpress.core.database.",
    )
    with context.begin_transaction():
        context.run_migrations()
    if connection.dialect.name == "sqlite" and (broken := connection.execute(text("PRAGMA foreign_key_check")).all()):
        raise RuntimeError(f"the migration left rows that refer to nothing: {broken[:3]}")


run()
