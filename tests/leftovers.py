"""Nothing of a test run may stay behind in the temporary folder.

The whole run, with every process that it starts, gets a temporary folder of its own. What is still there when the last test has ended
fails the run. pytest's own folders stay where they were, since pytest keeps the last three on purpose.
"""

import getpass
import os
import shutil
import tempfile
from pathlib import Path

import pytest

#: torch makes this one empty folder for its compiler's cache, once for each user, whether or not anything is compiled.
_CACHE = f"torchinductor_{getpass.getuser()}"
_SHOWN = 5  #: names of what lies in a folder that was left
_FOLDER = pytest.StashKey[Path]()
_LEFT = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # a worker of xdist inherits the folder of the process that started it
        return
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    folder = Path(tempfile.mkdtemp(prefix="np-"))  # a short name: sockets lie below it, whose paths are short
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
    """Its name; of a folder also what lies in it, which tells who made it."""
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
