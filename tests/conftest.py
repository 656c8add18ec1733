"""Fixtures that every kind of test shares: real servers, migrated databases, real models."""

import functools
import gc
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# Set before anything imports torch: the tests share two cores with the servers and children that they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # for tests that import ONNX Runtime before anything of ours
# torch's cache of operations on tensors without data costs a trace of one or two blocks a second, and pays from about six blocks on.
os.environ.setdefault("TORCH_FAKE_TENSOR_DISPATCH_CACHE", "0")

import hypothesis
import pytest
from sqlalchemy import Engine

from nightpress.core.database import make_engine
from nightpress.core.service.jobs.store import JobStore
from tests.databases import migrated_postgres, migrated_sqlite
from tests.jobs import add_model
from tests.models import bert_tiny_dir, minilm_dir, remove_shared_models
from tests.servers import S3, Postgres, Valkey

pytest_plugins = ["tests.cpu_time", "tests.leftovers"]

# No property is judged by the time that an example takes: other work may slow the machine.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")

#: imports of libraries whose arithmetic differs between processors, and with it a test's figures
_ARITHMETIC = re.compile(
    r"^\s*(?:from|import) (?:torch|onnx|openvino|transformers|nightpress\.core\.compress|tests\.(?:press|training))\b",
    re.M,
)

#: folders whose tests start and kill whole installations
_INSTALLATIONS = {"e2e", "faults"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that do arithmetic, and run the files first that take longest.

    If a file with slow tests or with many tests started last, one worker would be busy while the others were idle. Whole installations take
    longest, however few their tests are.
    """
    for item in items:
        if item.path.parent.name in _INSTALLATIONS:
            item.add_marker(pytest.mark.slow)
    tests = Counter(item.path for item in items)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    touches = {path: bool(_ARITHMETIC.search(path.read_text())) for path in tests}
    for item in items:
        if touches[item.path]:
            item.add_marker(pytest.mark.arithmetic)
    items.sort(key=lambda item: (item.path not in slow, item.path.parent.name != "e2e", -tests[item.path]))


def pytest_collection() -> None:
    """The imports of torch and of all tests make a million objects. The collector need not look through them now, or ever."""
    gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
    # torch describes each step of a trace to this logger as soon as it has a handler. pytest adds one to each logger that does not propagate.
    # Without it, a trace takes a quarter less time.
    logging.getLogger("torch.__trace").propagate = True


def _name_no_test() -> None:
    """Take the name of the current test from the environment variables.

    A process that loads models with transformers is forked from one that has imported the libraries, and only if both have the same
    variables. With this one, each test would import the libraries anew.
    """
    os.environ.pop("PYTEST_CURRENT_TEST", None)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup() -> None:
    _name_no_test()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call() -> None:
    _name_no_test()


def pytest_runtest_setup() -> None:
    """Let torch's exporter read its translations of operators once, and not for each graph, which would take a second.

    This changes nothing before the first graph was exported: only then is the module there.
    """
    module = sys.modules.get("torch.onnx._internal.exporter._registration")
    if module is not None and not hasattr(module.ONNXRegistry.from_torchlib, "cache_info"):
        module.ONNXRegistry.from_torchlib = staticmethod(functools.cache(module.ONNXRegistry.from_torchlib))


def pytest_sessionfinish() -> None:
    remove_shared_models()


def pytest_xdist_auto_num_workers() -> int:
    """One more than the number of processors: many tests wait for a lease, or for a server or child to start. Two more were no faster."""
    return (os.cpu_count() or 1) + 1


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    with Postgres(tmp_path_factory.mktemp("postgres")) as server:
        yield server


@pytest.fixture(scope="session")
def valkey_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    with Valkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture(scope="module")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """Each file that needs it has its own: it starts in half a CPU second, and takes one every two minutes while nobody uses it."""
    with S3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def sql_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a fresh migrated database. The test runs once with SQLite and once with PostgreSQL."""
    if request.param == "sqlite":
        return migrated_sqlite(tmp_path / "nightpress.db")
    return migrated_postgres(request.getfixturevalue("postgres_server"))


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """The URL of a fresh migrated SQLite database, for tests in which the kind of database doesn't matter."""
    return migrated_sqlite(tmp_path / "nightpress.db")


@pytest.fixture
def engine(sql_url: str) -> Iterator[Engine]:
    """A pool of eight connections to a fresh migrated database. The test runs once with SQLite and once with PostgreSQL."""
    engine = make_engine(sql_url, pool_size=8)
    yield engine
    engine.dispose()


@pytest.fixture
def store(engine: Engine) -> JobStore:
    """A job store. Its database has the model for which tests/jobs.py submits jobs."""
    add_model(engine)
    return JobStore(engine)


@pytest.fixture(scope="session")
def bert_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert_tiny_dir(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return minilm_dir(tmp_path_factory.mktemp("models"))
