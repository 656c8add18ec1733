"""Shared by the integration tests: settings of a registry, an SQLite database, and a comparison of whole rows."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from nightpress.core.database import make_engine
from nightpress.core.settings import Settings
from tests.columns import Rows


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings of a registry, with a folder on the server from which models and data sets may be taken."""
    return Settings(_env_file=None, data_dir=tmp_path / "np", model_roots=[tmp_path / "allowed"])


@pytest.fixture
def sqlite_engine(sqlite_url: str) -> Iterator[Engine]:
    """A pool of connections to a fresh migrated SQLite database."""
    engine = make_engine(sqlite_url)
    yield engine
    engine.dispose()


@pytest.fixture
def rows(engine: Engine) -> Rows:
    return Rows(engine)
