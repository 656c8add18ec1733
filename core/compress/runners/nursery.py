"""Starts runners of transformers as forks of one process. Importing transformers takes seconds each time.

This process is `python -I -B nursery.py FD`, or a job's process forks it before it imports anything of the compression core
(export/nursery.py). It has imported the libraries and does nothing else, so a fork of it is as fresh as a new interpreter after its imports. CUDA can't be
used in a fork of a process that it has run in; if an import has started it, a runner for a GPU becomes a new interpreter. FD is a
socket of whole messages. Each message is JSON (`runner`, `request`, `cwd`, `env` and `file_limit`) and carries four file descriptors: the
fork's standard input, output and error, and a socket for its end. Its status is written there, as of `subprocess.Popen.returncode`. If the other
side closes that socket first, the fork is killed. When FD's other side is closed, all forks are killed, and this process ends.

ranks/nursery.py forks the processes of one model by the same loop.
"""

import contextlib
import gc
import json
import os
import resource
import runpy
import selectors
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import NoReturn

_LONGEST = 1 << 16  #: bytes of a message
_SENT = 4  #: most file descriptors of a message
#: What a fork does with a message and its file descriptors, without the last one, which is for its end.
Become = Callable[[bytes, list[int]], None]


def serve(descriptor: int, become: Become, *, tells_pid: bool = False) -> NoReturn:
    """Start what is asked for at this socket, until its other side is closed. tells_pid: write each fork's process id before its status."""
    waiting = selectors.DefaultSelector()
    asked = socket.socket(fileno=descriptor)
    waiting.register(asked, selectors.EVENT_READ)
    while True:
        for ready, _ in waiting.select():
            if ready.fileobj is asked:
                message, given, _, _ = socket.recv_fds(asked, _LONGEST, _SENT)
                if not message:
                    os._exit(0)  # the forks get SIGKILL: see `_die_with`
                fork = _start(become, message, given)
                if tells_pid:
                    fork.tell(fork.pid)
                for source in (fork.ended, fork.end):
                    waiting.register(source, selectors.EVENT_READ, fork)
            elif isinstance(ready.data, _Fork):
                _attend(ready.data, waiting)


def import_libraries() -> None:
    """Import what loads models, without collecting garbage: the libraries' million objects are none."""
    # From Python 3.12 on, a fork warns if there are other threads. The libraries' threads wait for work, and a fork starts its own.
    warnings.filterwarnings("ignore", ".*multi-threaded", DeprecationWarning)
    gc.disable()
    import torch  # noqa: F401
    import transformers.activations
    import transformers.modeling_layers
    import transformers.modeling_utils
    import transformers.models.auto.modeling_auto  # noqa: F401

    gc.freeze()  # so that a collection in a fork copies none of their pages


class _Fork:
    """A fork that was started: its process, a descriptor that tells its end, and the socket that its starter waits at."""

    def __init__(self, pid: int, end: socket.socket) -> None:
        self.pid = pid
        self.ended = os.pidfd_open(pid)
        self.end = end
        self.over = False

    def tell(self, number: int) -> None:
        with contextlib.suppress(OSError):  # its starter has gone
            self.end.send(str(number).encode())


def _start(become: Become, message: bytes, given: list[int]) -> _Fork:
    *used, end = given
    parent = os.getpid()
    pid = os.fork()
    if not pid:
        _run(become, message, used, parent)
    for descriptor in used:
        os.close(descriptor)
    return _Fork(pid, socket.socket(fileno=end))


def _run(become: Become, message: bytes, used: list[int], parent: int) -> NoReturn:
    """Be what is asked for as if it were this process's program."""
    status = 1
    try:
        _die_with(parent)
        become(message, used)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def become_runner(message: bytes, standard: list[int]) -> None:
    """Run a runner's script. standard: its standard input, output and error."""
    told = json.loads(message)
    settle_in(standard, told["cwd"])
    resource.setrlimit(resource.RLIMIT_FSIZE, (told["file_limit"], told["file_limit"]))
    for name, value in told["env"].items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    if os.environ.get("CUDA_VISIBLE_DEVICES") != "" and can_use_no_gpu():
        os.execv(sys.executable, [sys.executable, "-I", "-B", told["runner"], told["request"]])  # noqa: S606 - it is this interpreter
    sys.argv = [told["runner"], told["request"]]
    runpy.run_path(told["runner"], run_name="__main__")


def settle_in(standard: list[int], folder: str) -> None:
    """Take a folder, and a standard input, output and error. No other file descriptor of the process before the fork stays open."""
    for number, descriptor in enumerate(standard):
        os.dup2(descriptor, number)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.chdir(folder)


def can_use_no_gpu() -> bool:
    """Whether CUDA ran in the process that this one was forked from: a library has looked for GPUs while it was imported."""
    import torch

    return torch.cuda._is_in_bad_fork()


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)  # it ended before the kernel was asked


def _attend(fork: _Fork, waiting: selectors.BaseSelector) -> None:
    """Report the end of a fork, or kill it if nobody waits for it any more."""
    if fork.over:
        return  # both of its descriptors were ready in the same round
    pid, status = os.waitpid(fork.pid, os.WNOHANG)
    if not pid:
        os.kill(fork.pid, signal.SIGKILL)
        _, status = os.waitpid(fork.pid, 0)
    fork.over = True
    waiting.unregister(fork.ended)
    waiting.unregister(fork.end)
    fork.tell(os.waitstatus_to_exitcode(status))
    fork.end.close()
    os.close(fork.ended)


if __name__ == "__main__":
    import_libraries()
    serve(int(sys.argv[1]), become_runner)
