"""Migrated databases. The migrations run once for each kind of database in a test process; every further one is a copy."""

import sqlite3
import tempfile
from functools import cache
from pathlib import Path

from nightpress import migrations
from tests.servers import Postgres


def migrated_sqlite(path: Path) -> str:
    """A new SQLite database at `path` with every migration applied; its SQLAlchemy URL."""
    path.write_bytes(_migrated_file())
    return f"sqlite:///{path}"


def migrated_postgres(server: Postgres) -> str:
    """A new database of the server with every migration applied; its SQLAlchemy URL."""
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
    """The name of a migrated database that nobody connects to, as PostgreSQL asks of a template."""
    url = server.create_database()
    migrations.upgrade(url)
    return url.rsplit("/", 1)[1]
