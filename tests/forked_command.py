"""The `nightpress` command for shells in tests, forked from a process that has imported it: the import takes a CPU second.

Each command is a process of its own, with the arguments, folder, environment and open files of its caller, and its own exit status. What is
left out is the start of Python, which tests/e2e/test_demo_path.py and tests/e2e/test_wheel.py test.
"""

import fcntl
import gc
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from tests.service import ROOT, eventually

#: The caller's side. It runs without site-packages, and sends all its open files: a shell's `<(…)` is one.
_CALLER = """#!{python} -IS
import json, os, socket, sys

if "--show-completion" in sys.argv:  # asks which shell its parent process is
    os.execv(sys.executable, [sys.executable, "-m", "nightpress.client.cli.main", *sys.argv[1:]])
files = [int(name) for name in os.listdir("/dev/fd")]
files = [file for file in files if os.path.exists(f"/proc/self/fd/{{file}}") or file <= 2]
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    call = {{"files": files, "arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}
    socket.send_fds(server, [json.dumps(call).encode()], files)
    server.shutdown(socket.SHUT_WR)
    status = server.recv(8)
sys.exit(int(status) if status else "the process of the command has gone")
"""
_MAX_FILES = 64


@contextmanager
def forked_command(folder: Path, environment: Mapping[str, str]) -> Iterator[Path]:
    """A folder with a program `nightpress`, to be put first on PATH. `folder`: an empty one with a short path, since a socket lies in it."""
    address, commands = folder / "socket", folder / "bin"
    commands.mkdir()
    (commands / "nightpress").write_text(_CALLER.format(python=sys.executable, address=str(address)))
    (commands / "nightpress").chmod(0o755)
    server = subprocess.Popen([sys.executable, "-m", "tests.forked_command", str(address)], env=environment, cwd=ROOT)
    try:
        eventually(lambda: address.exists() or server.poll() is not None, within=60)
        assert server.poll() is None
        yield commands
    finally:
        server.terminate()
        server.wait()


def _serve(address: str) -> NoReturn:
    from nightpress.client.cli.main import main

    gc.freeze()  # or each command would copy these objects' pages
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        while True:
            caller, _ = listener.accept()
            if os.fork() == 0:
                break
            caller.close()
            _reap()
    text, files = _receive(caller)
    command = os.fork()
    if command:
        _, status = os.waitpid(command, 0)
        caller.send(str(os.waitstatus_to_exitcode(status) & 0xFF).encode())
        os._exit(0)
    caller.close()
    call = json.loads(text)
    high = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 1000) for file in files]
    for file, number in zip(high, call["files"], strict=True):
        os.dup2(file, number)
    os.chdir(call["folder"])
    os.environ.clear()
    os.environ.update(call["environment"])
    sys.argv = ["nightpress", *call["arguments"]]
    main()
    sys.exit()


def _receive(caller: socket.socket) -> tuple[bytes, list[int]]:
    text, files, _, _ = socket.recv_fds(caller, 1 << 16, _MAX_FILES)
    while more := caller.recv(1 << 16):
        text += more
    return text, files


def _reap() -> None:
    """Forget the processes of commands that have ended."""
    try:
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass
    except ChildProcessError:
        return


if __name__ == "__main__":
    _serve(sys.argv[1])
