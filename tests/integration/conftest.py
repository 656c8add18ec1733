"""Shared by the integration tests: a registry's settings, an SQLite database, a comparison of whole rows, a Hub, and groups of processes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from nightpress.core.compress.ranks.forks import end_nurseries
from nightpress.core.compress.ranks.launch import Ranks
from nightpress.core.database import make_engine
from nightpress.core.settings import Settings
from tests.columns import Rows
from tests.hub import Hub, serve_hub


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


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve_hub() as hub:
        yield hub


# Processes that compute one model together -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(2, tmp_path_factory.mktemp("two")) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(3, tmp_path_factory.mktemp("three")) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(4, tmp_path_factory.mktemp("four")) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def tests_can_be_imported() -> Iterator[None]:
    """The processes find the functions that tests give them, and their time is counted as this module's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        yield
        end_nurseries()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """This process has as many threads as each of several."""
    import torch  # most integration tests don't need it

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
