"""Runners that are forked from a process with the libraries: each is as a process of its own, and none outlives its starter."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import psutil
import pytest

from nightpress.core.compress.export import nursery
from nightpress.core.compress.export.consumer_environment import runner_environment, variables_as_now
from tests.patience import slowness

# Slow: each process that forks the others imports the libraries.
pytestmark = pytest.mark.slow

Start = Callable[..., tuple[nursery.Fork, dict[str, Any]]]

SCRIPT = """
import json, os, resource, sys, tempfile
print(json.dumps({
    "request": sys.argv[1], "cwd": os.getcwd(), "pid": os.getpid(), "nursery": os.getppid(), "name": __name__,
    "temporary": tempfile.gettempdir(), "word": os.environ.get("WORD"),
    "ours": [name for name in sys.modules if name.startswith("nightpress")], "libraries": "transformers.modeling_utils" in sys.modules,
    "open": sorted(os.listdir("/proc/self/fd")), "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
    "strange": "/strange" in sys.path or "PYTHONPATH" in os.environ, "longest_file": resource.getrlimit(resource.RLIMIT_FSIZE)[0],
}), flush=True)
for line in sys.stdin:
    if line.startswith("fail"):
        raise ValueError("it fails as it was told")
    if line.startswith("exit"):
        sys.exit(5)
    print(line.upper(), end="", flush=True)
"""

OWNER = """
import sys, tempfile
from pathlib import Path
from nightpress.core.compress.export import nursery
here = Path(sys.argv[1])
environment = {"TMPDIR": sys.argv[1], "PATH": "/usr/bin"}
forks = [nursery.start(here / "runner.py", here, cwd=here, errors=tempfile.TemporaryFile(), environment=environment) for _ in "12"]
print(*(fork.stdout.readline().decode().strip() for fork in forks), sep="\\n", flush=True)
sys.stdin.read()
"""

FORKS_ITSELF = """
import json, os, sys, tempfile
from pathlib import Path
from nightpress.core.compress.export import nursery
from nightpress.core.compress.runners.nursery import import_libraries
here = Path(sys.argv[1])
tempfile.gettempdir()
environment = {"TMPDIR": sys.argv[1], "PATH": "/usr/bin", "WORD": "the nursery's"}
import_libraries()
nursery.fork_off(environment)
import nightpress.core.compress.pipeline
fork = nursery.start(here / "runner.py", here, cwd=here, errors=tempfile.TemporaryFile(), environment=environment)
seen = json.loads(fork.stdout.readline())
print(json.dumps(seen | {"starter": os.getpid(), "parent": int(Path(f"/proc/{seen['nursery']}/stat").read_text().split()[3])}))
fork.stdin.close()
assert fork.wait() == 0
"""


@pytest.fixture
def runner(tmp_path: Path) -> Path:
    path = tmp_path / "runner.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture
def errors() -> Iterator[IO[bytes]]:
    with tempfile.TemporaryFile() as file:
        yield file


@pytest.fixture
def start(runner: Path, errors: IO[bytes]) -> Iterator[Start]:
    """Starts a fork, and returns it with what it says at first."""
    with contextlib.ExitStack() as at_the_end:

        def begin(**variables: str) -> tuple[nursery.Fork, dict[str, Any]]:
            here = runner.parent
            environment = {"TMPDIR": str(here), "PATH": os.environ["PATH"], **variables}
            fork = nursery.start(runner, here / "request", cwd=here, errors=errors, environment=environment)
            for stream in (fork.stdin, fork.stdout):
                at_the_end.callback(stream.close)
            at_the_end.callback(fork.wait)
            at_the_end.callback(fork.kill)
            return fork, json.loads(fork.stdout.readline())

        yield begin


def ask(fork: nursery.Fork, line: str) -> str:
    fork.stdin.write(line.encode() + b"\n")
    fork.stdin.flush()
    return fork.stdout.readline().decode().strip()


def test_a_fork_is_as_a_program_of_its_own(start: Start, runner: Path):
    (first, seen), (second, other) = start(), start()
    here = str(runner.parent)
    assert (seen["request"], seen["cwd"], seen["temporary"]) == (f"{here}/request", here, here)
    assert (seen["name"], seen["ours"], seen["libraries"]) == ("__main__", [], True)
    assert seen["open"][:3] == ["0", "1", "2"]
    assert len(seen["open"]) == 4, "the descriptor that lists them is the fourth"
    assert seen["nursery"] == other["nursery"] != os.getpid()
    assert seen["pid"] != other["pid"]
    assert (ask(first, "first"), ask(second, "second")) == ("FIRST", "SECOND")
    for fork in (first, second):
        fork.stdin.close()
        assert fork.wait() == 0


def test_how_a_fork_ends_is_told(start: Start, errors: IO[bytes]):
    forks = [start()[0] for _ in range(3)]
    assert [ask(fork, line) for fork, line in zip(forks, ("fail", "exit", "stay"), strict=True)] == ["", "", "STAY"]
    forks[2].kill()
    assert [fork.wait() for fork in forks] == [1, 5, -signal.SIGKILL]
    errors.seek(0)
    assert b"ValueError: it fails as it was told" in errors.read()
    forks[2].kill()  # again, of what has ended


def test_forks_end_with_their_nursery_and_the_next_gets_a_new_one(start: Start):
    fork, seen = start()
    os.kill(seen["nursery"], signal.SIGKILL)
    assert fork.wait() == -signal.SIGKILL
    assert fork.stdout.read() == b""
    again, other = start()
    assert other["nursery"] != seen["nursery"]
    assert ask(again, "more") == "MORE"
    assert not psutil.pid_exists(seen["nursery"])


def test_other_variables_get_another_nursery(start: Start):
    """Libraries read most variables when they are imported."""
    fork, seen = start()
    ask(fork, "exit")
    fork.wait()
    fork, other = start(WORD="two")
    ask(fork, "exit")
    fork.wait()
    assert (seen["word"], other["word"]) == (None, "two")
    assert seen["nursery"] != other["nursery"]
    assert not psutil.pid_exists(seen["nursery"])


@pytest.fixture
def of_a_fixture(tmp_path: Path) -> dict[str, str]:
    return runner_environment("cpu", 1, tmp_path)


def test_tests_and_their_fixtures_share_a_nursery(of_a_fixture: dict[str, str], tmp_path: Path):
    """pytest tells each process which test runs: tests/conftest.py removes that variable."""
    assert of_a_fixture == runner_environment("cpu", 1, tmp_path)
    assert "PYTEST_CURRENT_TEST" not in of_a_fixture


def test_a_nursery_that_was_begun_before_its_job_serves_it(start: Start, runner: Path, errors: IO[bytes]):
    """A spare child begins it. Which GPUs the job has, and how long its files may be, is known later."""
    nursery.begin({"TMPDIR": "/", "PATH": os.environ["PATH"]})
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 40, hard))
    try:
        _, seen = start(CUDA_VISIBLE_DEVICES="GPU-1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
    _, other = start()
    assert (seen["gpus"], other["gpus"]) == ("GPU-1", None)
    assert (seen["longest_file"], other["longest_file"]) == (1 << 40, before)
    assert seen["nursery"] == other["nursery"]


def test_what_libraries_set_in_a_job_reaches_no_consumer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """torch sets variables when it first uses a GPU. With other variables, each later process would import the libraries again."""
    monkeypatch.setenv("WORD", "before")
    with variables_as_now():
        monkeypatch.setenv("WORD", "in the job")
        monkeypatch.setenv("CUDA_MODULE_LOADING", "LAZY")
        inside = runner_environment("cuda", 1, tmp_path)
    assert inside["WORD"] == "before"
    assert "CUDA_MODULE_LOADING" not in inside
    assert runner_environment("cuda", 1, tmp_path)["WORD"] == "in the job"


def test_a_process_that_imported_the_libraries_can_fork_its_nursery(runner: Path):
    """So does each job. Nothing of ours, none of its variables and none of its open files are in a runner."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(["/strange", *sys.path]), "WORD": "the starter's"}
    command = [sys.executable, "-c", FORKS_ITSELF, str(runner.parent)]
    said = subprocess.run(command, env=variables, stdout=subprocess.PIPE, check=True).stdout
    seen = json.loads(said.splitlines()[-1])
    assert seen["parent"] == seen["starter"], "it is a fork, and no program of its own"
    assert (seen["name"], seen["ours"], seen["libraries"]) == ("__main__", [], True)
    assert (seen["word"], seen["temporary"], seen["strange"]) == ("the nursery's", str(runner.parent), False)
    assert len(seen["open"]) == 4, "the descriptor that lists them is the fourth"


def test_nothing_outlives_a_starter_that_is_killed(runner: Path):
    command = [sys.executable, "-c", OWNER, str(runner.parent)]
    owner = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert owner.stdin is not None
    assert owner.stdout is not None
    with owner.stdin, owner.stdout:
        seen = [json.loads(owner.stdout.readline()) for _ in range(2)]
        owner.kill()
        owner.wait()
    left = {seen[0]["nursery"], *(fork["pid"] for fork in seen)}
    deadline = time.monotonic() + 20 * slowness()
    while left and time.monotonic() < deadline:
        left = {pid for pid in left if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE}
        time.sleep(0.05)
    assert not left
