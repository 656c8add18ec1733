"""Follows docs/how-to/write-a-pass.md: its package is built, installed into a separate environment, tested, and used by real jobs."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from nightpress.core.handoff.report import Report
from tests.servers import free_port
from tests.service import ROOT

pytestmark = pytest.mark.slow

PAGE = (ROOT / "docs" / "how-to" / "write-a-pass.md").read_text()
_FILE = re.compile(r"^`nightpress-clip/(?P<path>[\w./-]+)`.*?^```\w+\n(?P<text>.*?)^```$", re.M | re.S)
_YAML = re.compile(r"^```yaml\n(.*?)^```$", re.M | re.S)
ALLOWED = '["nightpress-clip"]'


def run(*command: str, cwd: Path, status: int = 0, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=_clean() | environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == status, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def _clean() -> dict[str, str]:
    mine = {name: value for name, value in os.environ.items() if not name.startswith("NIGHTPRESS_")}
    return mine | {"COLUMNS": "200", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's folder, with the files that the page shows."""
    folder = tmp_path_factory.mktemp("written") / "nightpress-clip"
    files = {found["path"]: found["text"] for found in _FILE.finditer(PAGE)}
    assert set(files) == {
        "pyproject.toml",
        "nightpress_clip/__init__.py",
        "nightpress_clip/options.py",
        "nightpress_clip/function.py",
        "tests/test_clip.py",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory, project: Path) -> str:
    """The Python of an environment with the package. A .pth file adds all packages of the test's own environment."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", str(folder), cwd=folder.parent)
    [own] = folder.glob("lib/python*/site-packages")
    (own / "ours.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    python = str(folder / "bin" / "python")
    install(python, project)
    return python


def install(python: str, project: Path) -> None:
    shutil.rmtree(project / "build", ignore_errors=True)
    options = ("--no-deps", "--no-build-isolation", "--no-index")
    run(python, "-m", "pip", "install", *options, str(project), cwd=project.parent)


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    [text] = _YAML.findall(PAGE)
    (tmp_path / "clipped.yaml").write_text(text)
    return str(tmp_path / "clipped.yaml")


def nightpress(python: str, *arguments: str, cwd: Path, status: int = 0, **environment: str) -> str:
    command = (python, "-m", "nightpress.client.cli.main", *arguments)
    return run(*command, cwd=cwd, status=status, **environment)


def test_the_package_s_own_test_passes(python: str, project: Path) -> None:
    said = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", cwd=project)
    assert "1 passed" in said


def test_a_press_on_this_machine_uses_it_where_it_is_allowed(
    python: str, recipe: str, bert_tiny: Path, tmp_path: Path
) -> None:
    press = ("press", str(bert_tiny), "--recipe", recipe, "--threads", "1")
    refused = nightpress(python, *press, "--out", "out", cwd=tmp_path, status=4)
    assert "nightpress-clip 0.1.0 has one and is installed, but it is not allowed" in refused
    assert f"NIGHTPRESS_PASSES='{ALLOWED}'" in refused
    nightpress(python, *press, "--out", "out", cwd=tmp_path, NIGHTPRESS_PASSES=ALLOWED)
    report = Report.model_validate_json((tmp_path / "out" / "report.json").read_bytes())
    [record] = report.passes
    assert (record.name, record.package, record.package_version) == ("clip", "nightpress-clip", "0.1.0")
    assert report.environment["versions"]["nightpress-clip"] == "0.1.0"
    assert "- `clip` of nightpress-clip 0.1.0: " in (tmp_path / "out" / "report.md").read_text()
    assert "a pass of the package nightpress-clip 0.1.0" in (tmp_path / "out" / "report.html").read_text()
    name = "bert.encoder.layer.0.output.dense.weight"
    before = load_file(bert_tiny / "model.safetensors")
    name = next(name for name in before if name.endswith("encoder.layer.0.output.dense.weight"))
    after = load_file(tmp_path / "out" / "safetensors" / "model.safetensors")[name]
    bound = 2 * before[name].double().square().mean(dim=1, keepdim=True).sqrt()
    assert (after.double() - before[name].double().clamp(-bound, bound)).abs().max() < 1e-6
    assert not after.equal(before[name])


@pytest.fixture(scope="module")
def service(python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a running service that allows the package."""
    folder = tempfile.mkdtemp(prefix="np-")  # a unix socket's path has at most 107 bytes
    environment = {
        "NIGHTPRESS_DATA_DIR": folder,
        "NIGHTPRESS_API_PORT": str(free_port()),
        "NIGHTPRESS_PASSES": ALLOWED,
        "NIGHTPRESS_DRAIN_S": "2",
        "NIGHTPRESS_WORKER_SPARE": "false",
        "NIGHTPRESS_MAX_FAILURES": "1",
    }
    nightpress(python, "up", "--detach", cwd=tmp_path_factory.getbasetemp(), **environment)
    yield environment
    nightpress(python, "down", cwd=tmp_path_factory.getbasetemp(), **environment)
    shutil.rmtree(folder, ignore_errors=True)


def test_a_service_that_allows_it_lists_plans_and_runs_it(
    python: str, service: dict[str, str], recipe: str, bert_tiny: Path, tmp_path: Path
) -> None:
    [listed] = [
        line
        for line in nightpress(python, "recipes", "passes", cwd=tmp_path, **service).splitlines()
        if "nightpress-clip" in line
    ]
    assert re.search(r"clip\s.*nightpress-clip 0\.1\.0", listed)
    assert "at most 2 times" in nightpress(python, "recipes", "validate", recipe, cwd=tmp_path, **service)
    # The client's environment lacks the package, so the client shows the service's description.
    assert "at most 2 times" in nightpress(sys.executable, "recipes", "validate", recipe, cwd=tmp_path, **service)
    submit = ("submit", str(bert_tiny), "--recipe", recipe, "--wait", "--json", "--reuse")
    job = json.loads(nightpress(python, *submit, cwd=tmp_path, **service))
    assert (job["state"], job["attempt"], job["reused_from"]) == ("succeeded", 1, None)
    report = Report.model_validate_json(nightpress(python, "report", job["id"], "--json", cwd=tmp_path, **service))
    assert [(options.name, options.package, options.package_version) for options in report.passes] == [
        ("clip", "nightpress-clip", "0.1.0")
    ]
    again = json.loads(nightpress(python, *submit, cwd=tmp_path, **service))
    assert again["reused_from"] == job["id"]


def test_after_an_update_the_older_version_s_result_is_not_reused(
    python: str, service: dict[str, str], recipe: str, project: Path, bert_tiny: Path, tmp_path: Path
) -> None:
    submit = ("submit", str(bert_tiny), "--recipe", recipe, "--wait", "--json", "--reuse")
    first = json.loads(nightpress(python, *submit, cwd=tmp_path, **service))
    pyproject = project / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace('version = "0.1.0"', 'version = "0.2.0"'))
    install(python, project)
    failed = nightpress(python, *submit[:-1], cwd=tmp_path, status=1, **service)
    assert "nightpress-clip 0.1.0, and where the job runs version 0.2.0 is installed" in failed
    nightpress(python, "down", cwd=tmp_path, **service)
    nightpress(python, "up", "--detach", cwd=tmp_path, **service)
    second = json.loads(nightpress(python, *submit, cwd=tmp_path, **service))
    assert second["reused_from"] is None
    assert second["id"] != first["id"]
    report = Report.model_validate_json(nightpress(python, "report", second["id"], "--json", cwd=tmp_path, **service))
    assert report.passes[0].package_version == "0.2.0"
