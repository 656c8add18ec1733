"""Migrated databases. In a test process the migrations run once for each kind of database; each test gets a copy of the result."""

import sqlite3
import tempfile
from functools import cache
from pathlib import Path

from nightpress import migrations
from tests.servers import Postgres


def migrated_sqlite(path: Path) -> str:
    """Make a SQLite database at `path` with all migrations applied. Returns its SQLAlchemy URL."""
    path.write_bytes(_migrated_file())
    return f"sqlite:///{path}"


def migrated_postgres(server: Postgres) -> str:
    """Make a database on the server with all migrations applied. Returns its SQLAlchemy URL."""
    return server.create_database(template=_template_of(server))


@cache
def _migrated_file() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "migrated.db"
        migrations.upgrade(f"sqlite:///{path}")
        connection = sqlite3.connect(path)
        content = connection.serialize()
        connection.close()
    return content


@cache
def _template_of(server: Postgres) -> str:
    """The name of a migrated database without connections: PostgreSQL copies a template only while nobody is connected to it."""
    url = server.create_database()
    migrations.upgrade(url)
    return url.rsplit("/", 1)[1]
