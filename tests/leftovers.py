"""Fails a test run that leaves files in the temporary folder.

The run and every process that it starts use a new temporary folder. If it is not empty after the last test, the run fails. pytest's
own folders stay in the usual place, since pytest keeps the last three on purpose.
"""

import getpass
import os
import shutil
import tempfile
from pathlib import Path

import pytest

#: torch makes this empty folder for its compiler's cache, even if nothing is compiled.
_CACHE = f"torchinductor_{getpass.getuser()}"
_SHOWN = 5  #: most names that the message lists of a folder's content
_FOLDER = pytest.StashKey[Path]()
_LEFT = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # an xdist worker inherits its parent's folder
        return
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    # A short name: it is part of the paths of unix sockets, whose length is limited.
    folder = Path(tempfile.mkdtemp(prefix="np-"))
    config.stash[_FOLDER] = folder
    os.environ["TMPDIR"] = str(folder)
    tempfile.tempdir = None  # read TMPDIR again


@pytest.hookimpl(trylast=True)  # after the workers have ended
def pytest_sessionfinish(session: pytest.Session) -> None:
    folder = session.config.stash.get(_FOLDER, None)
    if folder is None:
        return
    left = [_describe(path) for path in sorted(folder.iterdir()) if path.name != _CACHE]
    session.config.stash[_LEFT] = left
    shutil.rmtree(folder, ignore_errors=True)
    if left and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _describe(path: Path) -> str:
    """The name of a file or folder. For a folder also the names in it, which show where it came from."""
    if not path.is_dir():
        return path.name
    inside = sorted(str(each.relative_to(path)) for each in path.rglob("*"))
    return f"{path.name} ({', '.join(inside[:_SHOWN]) or 'empty'})"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    left = config.stash.get(_LEFT, [])
    if left:
        terminalreporter.section("left behind in the temporary folder", red=True)
        terminalreporter.write_line(
            f"The tests, or what they started, left this behind: {', '.join(left)}. Remove it where it is made, or use tmp_path."
        )
