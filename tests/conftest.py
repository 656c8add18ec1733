"""Fixtures that every kind of test shares: real servers, migrated databases, real models."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported anywhere: two cores are shared by the tests and the servers and children they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from nightpress import migrations
from tests.models import bert_tiny_dir, minilm_dir, smollm_dir
from tests.servers import S3, Postgres, Valkey

#: the libraries by whose arithmetic, and so by the processor, a test's figures differ
_ARITHMETIC = re.compile(
    r"^\s*(?:from|import) (?:torch|onnx|openvino|transformers|core\.compress|tests\.(?:press|training))\b", re.M
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of modules that import a library of arithmetic, so that they can be run for another processor."""
    touches = {path: bool(_ARITHMETIC.search(path.read_text())) for path in {item.path for item in items}}
    for item in items:
        if touches[item.path]:
            item.add_marker(pytest.mark.arithmetic)


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are processors: many tests wait for a lease, a server or a child that starts."""
    return (os.cpu_count() or 1) + 1


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    with Postgres(tmp_path_factory.mktemp("postgres")) as server:
        yield server


@pytest.fixture(scope="session")
def valkey_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    with Valkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with S3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def sql_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh migrated database, once on each kind."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'nightpress.db'}"
    else:
        server: Postgres = request.getfixturevalue("postgres_server")
        url = server.create_database()
    migrations.upgrade(url)
    return url


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """A fresh migrated SQLite database, where the database's kind doesn't matter."""
    url = f"sqlite:///{tmp_path / 'nightpress.db'}"
    migrations.upgrade(url)
    return url


@pytest.fixture(scope="session")
def bert_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert_tiny_dir(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return minilm_dir(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def smollm() -> Path:
    return smollm_dir()
