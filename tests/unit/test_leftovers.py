"""A test run that leaves something in the temporary folder fails. A run that cleans up does not."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.service import ROOT

_TEST = """
import subprocess, sys, tempfile
from pathlib import Path

def test_it():
    {body}
"""
_LEAVES = """
    Path(tempfile.mkdtemp(prefix="forgotten-"), "thing").touch()
    subprocess.run([sys.executable, "-c", "import tempfile; tempfile.mkstemp(prefix='a-childs-')"], check=True)
"""


def _run(folder: Path, body: str, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_it.py").write_text(_TEST.format(body=body))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    plugins = ["-p", "tests.leftovers", "-p", "no:cacheprovider", "-p", "no:schemathesis", "-p", "no:hypothesispytest"]
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-c",
            "/dev/null",
            f"--rootdir={folder}",
            *plugins,
            *options,
            str(folder),
        ],
        env=environment | {"TMPDIR": str(folder), "PYTHONPATH": str(ROOT)},
        cwd=folder,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("options", [(), ("--numprocesses=1",)], ids=["one process", "xdist"])
@pytest.mark.slow
def test_a_run_that_leaves_something_fails_and_names_it(tmp_path: Path, options: tuple[str, ...]):
    done = _run(tmp_path, _LEAVES, *options)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    assert "1 passed" in done.stdout
    assert re.search(r"left this behind: a-childs-\w+, forgotten-\w+ \(thing\)\.", done.stdout), done.stdout
    assert not list(tmp_path.glob("np-*")), "the run's own folder is removed all the same"


@pytest.mark.slow
def test_a_run_that_tidies_up_passes(tmp_path: Path):
    done = _run(tmp_path, "tempfile.TemporaryDirectory().cleanup()")
    assert done.returncode == pytest.ExitCode.OK, done.stdout + done.stderr
    assert not list(tmp_path.glob("np-*"))
