"""The process that runners of transformers are forked from, as their starter sees it. See runners/nursery.py.

A process has one, begun with its first runner or by `begin`, or forked from itself by `fork_off`. It ends with its starter.
"""

import atexit
import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NoReturn, Protocol

from nightpress.core.compress.runners import nursery as program

RUNNERS = frozenset({"transformers_runner.py"})
#: Variables that each fork sets for itself. The libraries read the others when they are imported, so these must be the nursery's own. Of
#: HF_MODULES_CACHE the libraries keep the first value, and all forks can share that folder. CUDA reads which GPUs it may use when it starts.
_OF_A_FORK = ("TMPDIR", "HF_MODULES_CACHE", "CUDA_VISIBLE_DEVICES")


class Fork:
    """A runner in a fork of the nursery: what the starter of a process uses of `subprocess.Popen`."""

    def __init__(self, stdin: IO[bytes], stdout: IO[bytes], end: socket.socket) -> None:
        self.stdin, self.stdout = stdin, stdout
        self._end = end
        self._status: int | None = None

    @property
    def ended(self) -> bool:
        """Whether its end is known here."""
        return self._status is not None

    def wait(self) -> int:
        """Wait for its end. Returns its status, negative for a signal; −9 as well if the nursery was killed with it."""
        if self._status is None:
            said = self._end.recv(32)
            self._end.close()
            self._status = int(said) if said else -signal.SIGKILL
        return self._status

    def kill(self) -> None:
        if self._status is None:
            with contextlib.suppress(OSError):
                self._end.shutdown(socket.SHUT_WR)  # the nursery kills it, and still tells its status


class _Process(Protocol):
    """What is used of `subprocess.Popen`."""

    def poll(self) -> int | None: ...
    def kill(self) -> None: ...
    def wait(self) -> int: ...


class _Forked:
    """A fork of this process."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._status: int | None = None

    def poll(self) -> int | None:
        return self._reap(os.WNOHANG)

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self._pid, signal.SIGKILL)

    def wait(self) -> int:
        status = self._reap(0)
        assert status is not None
        return status

    def _reap(self, options: int) -> int | None:
        if self._status is None:
            pid, status = os.waitpid(self._pid, options)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status


class _Nursery:
    """The process, the socket that it is asked by, and the forks that it has started."""

    def __init__(self, environment: Mapping[str, str], process: _Process, asking: socket.socket) -> None:
        self.environment = environment
        self._process = process
        self._asking = asking
        self._forks: list[Fork] = []

    def serves(self, environment: Mapping[str, str]) -> bool:
        """Whether its forks have this environment, but for what each sets for itself."""
        return self._process.poll() is None and all(
            self.environment.get(name) == environment.get(name)
            for name in (self.environment.keys() | environment.keys()) - set(_OF_A_FORK)
        )

    def idle(self) -> bool:
        return all(fork.ended for fork in self._forks)

    def start(self, message: Mapping[str, Any], errors: IO[bytes]) -> Fork:
        ours, end = socket.socketpair()
        their_input, our_input = os.pipe()
        our_output, their_output = os.pipe()
        given = [their_input, their_output, errors.fileno(), end.fileno()]
        with end, contextlib.suppress(BrokenPipeError):  # if the nursery has just ended, `Fork.wait` tells it
            socket.send_fds(self._asking, [json.dumps(message).encode()], given)
        os.close(their_input)
        os.close(their_output)
        fork = Fork(os.fdopen(our_input, "wb"), os.fdopen(our_output, "rb"), ours)
        self._forks = [*(other for other in self._forks if not other.ended), fork]
        return fork

    def end(self) -> None:
        """End it and its forks, even while it imports the libraries."""
        self._asking.close()
        self._process.kill()
        self._process.wait()


def _started(environment: Mapping[str, str], errors: IO[bytes]) -> _Nursery:
    """A nursery that is a program of its own."""
    asking, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(program.__file__), str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            pass_fds=(theirs.fileno(),),
            env=dict(environment),
        )
    return _Nursery(environment, process, asking)


def _become(environment: Mapping[str, str], asked: socket.socket) -> NoReturn:
    """Be a nursery, in a fork of its starter: without the starter's files and variables, and without what it has of ours."""
    try:
        with Path(os.devnull).open("r+b") as nothing:
            os.dup2(nothing.fileno(), 0)
            os.dup2(nothing.fileno(), 1)
        os.dup2(asked.fileno(), 3)
        os.closerange(4, os.sysconf("SC_OPEN_MAX"))
        asked.detach()
        ours = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        sys.path[:] = [folder for folder in sys.path if folder not in ours]
        os.environ.clear()
        os.environ.update(environment)
        tempfile.tempdir = None  # it is looked for again
        for name in [name for name in sys.modules if name.partition(".")[0] == "nightpress"]:
            del sys.modules[name]
        program.serve(3, program.become_runner)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


_lock = threading.Lock()
_nurseries: list[_Nursery] = []


@atexit.register
def _end_all() -> None:
    for nursery in _nurseries:
        nursery.end()


def begin(environment: Mapping[str, str]) -> None:
    """Begin to import the libraries, for runners with this environment that will be started later."""
    with _lock, tempfile.TemporaryFile() as unread:
        _serving(environment, unread)


def fork_off(environment: Mapping[str, str]) -> None:
    """Have a fork of this process, which has imported the libraries and nothing of the compression core, start runners with this environment.

    So a job imports the libraries once, for itself and for all who load models.
    """
    assert not [name for name in sys.modules if name.startswith("nightpress.core.compress.pipeline")]
    asking, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        pid = os.fork()
        if not pid:
            _become(environment, theirs)
    with _lock:
        _nurseries.append(_Nursery(environment, _Forked(pid), asking))


def start(runner: Path, request: Path, *, cwd: Path, errors: IO[bytes], environment: Mapping[str, str]) -> Fork:
    """Start `runner` in a fork of the nursery, with this request file, working folder and environment.

    Another nursery is begun if there is none with these variables. Those with others end, unless their forks still run. errors: where the
    standard error goes.
    """
    file_limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)  # the nursery may be older than it
    message = {
        "runner": str(runner),
        "request": str(request),
        "cwd": str(cwd),
        "env": {name: environment.get(name) for name in _OF_A_FORK},
        "file_limit": file_limit,
    }
    with _lock:
        return _serving(environment, errors).start(message, errors)


def _serving(environment: Mapping[str, str], errors: IO[bytes]) -> _Nursery:
    """The nursery for this environment. If it is a new one, the others end, unless their forks still run."""
    found = next((nursery for nursery in _nurseries if nursery.serves(environment)), None)
    if found is None:
        found = _started(environment, errors)
        for other in [nursery for nursery in _nurseries if nursery.idle()]:
            other.end()
            _nurseries.remove(other)
        _nurseries.append(found)
    return found
