"""Shared by the fault tests: an installation whose workers, control process and broker are real processes."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import Valkey
from tests.service import Service


@pytest.fixture
def service(tmp_path: Path, sqlite_url: str, valkey_server: Valkey) -> Iterator[Service]:
    """An installation on SQLite, with leases of two seconds."""
    valkey_server.flush()
    service = Service(tmp_path, sqlite_url, broker_url=valkey_server.url)
    yield service
    service.close()
