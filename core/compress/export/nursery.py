"""The process that runners of transformers are forked from, as their starter sees it. See runners/nursery.py.

A process has one, begun with its first runner or by `begin`; a job that measures on both devices has one for each at a time. It ends with
its starter.
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
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

RUNNERS = frozenset({"transformers_runner.py"})
_PROGRAM = Path(__file__).parents[1] / "runners" / "nursery.py"
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


class _Nursery:
    """The process, the socket that it is asked by, and the forks that it has started."""

    def __init__(self, environment: Mapping[str, str], errors: IO[bytes]) -> None:
        self.environment = environment
        self._forks: list[Fork] = []
        self._asking, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-B", str(_PROGRAM), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                pass_fds=(theirs.fileno(),),
                env=dict(environment),
            )

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
        self._asking.close()
        self._process.wait()


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
        found = _Nursery(environment, errors)
        for other in [nursery for nursery in _nurseries if nursery.idle()]:
            other.end()
            _nurseries.remove(other)
        _nurseries.append(found)
    return found
