"""Processes of an installation for tests, forked from a process that has imported their code: the imports take two CPU seconds.

Each is a process of its own, with its arguments, folder, environment and output, and its own exit status. What is left out is the start of
Python: in tests/integration/test_devstack.py and tests/e2e/test_compose_commands.py, these programs are started. See decision 0198.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

from nightpress.core.compress.runners.nursery import serve, settle_in

ROOT = Path(__file__).parents[1]
#: `-m` name → the module whose `main` it runs
_MODULES = {
    "nightpress.api": "nightpress.api.__main__",
    "nightpress.worker": "nightpress.worker.__main__",
    "nightpress.worker.control": "nightpress.worker.control",
}
#: what these import when they have started
_IMPORTED_WHEN_STARTED = (
    "billiard.pool",
    "celery.app.amqp",
    "celery.app.control",
    "celery.app.log",
    "celery.apps.worker",
    "celery.backends.base",
    "celery.concurrency.thread",
    "celery.events.receiver",
    "celery.fixups.django",
    "celery.worker.autoscale",
    "celery.worker.components",
    "celery.worker.consumer.delayed_delivery",
    "celery.worker.strategy",
    "encodings.idna",
    "kombu.pidbox",
    "kombu.transport.redis",
    "nightpress.core.artifacts.local",
    "nightpress.core.artifacts.s3",
    "uvicorn.protocols.http.httptools_impl",
)
_SCRIPTS = frozenset({"tests/api_process.py", "tests/control_process.py", "tests/worker_process.py"})


class _Ours(socket.socket):
    """Closes itself when it is collected, also with a cycle. A plain socket would warn."""

    def __del__(self) -> None:
        self.close()


class Forked:
    """A forked process: what tests use of `subprocess.Popen`."""

    def __init__(self, command: Sequence[str], end: socket.socket) -> None:
        self.args = command
        self.returncode: int | None = None  #: negative for a signal
        self._end = end  #: tells the process's id, then its status
        self.pid = int(end.recv(32))

    def wait(self, timeout: float | None = None) -> int:
        """Its status; −9 as well if the process that it was forked from was killed. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            self._end.settimeout(timeout)
            try:
                told = self._end.recv(32, socket.MSG_PEEK)  # it stays there for other threads that wait
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0) from None
            self.returncode = int(told) if told else -signal.SIGKILL
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0.0)
        return None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


Process = subprocess.Popen[bytes] | Forked


class _Parent:
    """The process that the others are forked from, and the socket that it is asked by."""

    def __init__(self) -> None:
        self._asking, asked = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with asked:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.forked_process", str(asked.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=(asked.fileno(),),
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                cwd=ROOT,
            )
        atexit.register(self.end)

    def fork(self, command: Sequence[str], environment: Mapping[str, str], cwd: Path, log: IO[bytes]) -> Forked:
        call = {"command": command, "environment": dict(environment), "cwd": str(cwd)}
        ours, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with end, Path(os.devnull).open() as nothing:
            given = [nothing.fileno(), log.fileno(), log.fileno(), end.fileno()]
            socket.send_fds(self._asking, [json.dumps(call).encode()], given)
        return Forked(command, _Ours(fileno=ours.detach()))

    def end(self) -> None:
        """End it; the kernel ends its forks."""
        self._asking.close()
        self.process.kill()
        self.process.wait()


_lock = threading.Lock()
_parent: _Parent | None = None


def start(
    command: Sequence[str], *, environment: Mapping[str, str], cwd: Path, log: IO[bytes], through: Sequence[str] = ()
) -> Process:
    """Start Python with these arguments, environment and folder. Standard output and error go to `log`.

    The programs of this checkout are forked. Those of another checkout, and those that run through another program, are started.
    """
    if through or cwd != ROOT or not (command[0] in _SCRIPTS or (command[0] == "-m" and command[1] in _MODULES)):
        whole = [*through, sys.executable, *command]
        return subprocess.Popen(whole, env=environment, cwd=cwd, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    global _parent
    with _lock:
        if _parent is None:
            _parent = _Parent()
    return _parent.fork(command, environment, cwd, log)


def cpu_s() -> float:
    """CPU seconds that the forks which have ended took, with the process that they were forked from."""
    if _parent is None:
        return 0.0
    used = psutil.Process(_parent.process.pid).cpu_times()
    return float(used.user + used.system + used.children_user + used.children_system)


def _become(message: bytes, standard: list[int]) -> None:
    """Run the program that the message names. standard: its standard input, output and error."""
    call = json.loads(message)
    settle_in(standard, call["cwd"])
    os.environ.clear()
    os.environ.update(call["environment"])
    tempfile.tempdir = None  # it is looked for again
    gc.enable()
    try:
        _run(call["command"])
    finally:  # what Python does at its end, which a fork leaves out
        threading._shutdown()
        atexit._run_exitfuncs()


def _run(command: list[str]) -> None:
    if command[0] == "-m":
        _, module, *arguments = command
        sys.argv = [module, *arguments]
        sys.exit(importlib.import_module(_MODULES[module]).main())
    sys.argv = command
    runpy.run_path(str(ROOT / command[0]), run_name="__main__")


def _import_programs() -> None:
    gc.disable()
    for name in (*_MODULES.values(), *_IMPORTED_WHEN_STARTED):
        importlib.import_module(name)
    gc.freeze()  # so that a collection in a fork copies none of their pages


if __name__ == "__main__":
    _import_programs()
    serve(int(sys.argv[1]), _become, tells_pid=True)
