"""Servers for the benchmarks of the service."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from nightpress import migrations
from tests.servers import Postgres, Valkey


@contextmanager
def postgres_and_valkey(*, durable: bool = False) -> Iterator[tuple[Path, str, str]]:
    """Yields a temporary folder, the URL of a migrated database, and the URL of a broker. `durable`: PostgreSQL runs with fsync."""
    with (
        tempfile.TemporaryDirectory(prefix="nightpress-bench-") as folder,
        Postgres(Path(folder) / "postgres", durable=durable) as postgres,
        Valkey(Path(folder) / "valkey") as broker,
    ):
        url = postgres.create_database()
        migrations.upgrade(url)
        yield Path(folder), url, broker.url


def is_healthy(url: str) -> bool:
    """Whether an API at this address answers."""
    try:
        return httpx.get(f"{url}/healthz", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False
