"""Forks ranks from one process that has imported the core: `python -m nightpress.core.compress.ranks.nursery FD`. See forks.py.

Importing torch, transformers and the core takes seconds of processor time, which each rank would spend again. This process imports them and
does nothing else, so a fork of it is as fresh as a new interpreter after its imports. CUDA can't be used in a fork of a process that it has
run in; if an import has started it, a rank on a GPU becomes a new interpreter.

FD is a socket of whole messages. Each message names the GPU that a fork sees, as CUDA_VISIBLE_DEVICES does, or is `cpu`. It carries two file
descriptors: the fork's connection to its starter, and a socket for its end. The fork's process id is written there, and later its status, as of
`subprocess.Popen.returncode`. If the other side shuts that socket down first, the fork is killed. If FD's other side is closed, this
process ends, and all forks with it.
"""

import ctypes
import gc
import importlib
import os
import selectors
import signal
import socket
import sys
import traceback
import warnings
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from nightpress.core.compress.ranks import member

_LONGEST = 1 << 12  #: bytes of a message
_IMPORTED = (
    "torch.distributed",
    # transformers imports half of itself only when a model is made.
    "transformers.activations",
    "transformers.generation",
    "transformers.modeling_layers",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "nightpress.core.compress.passes",
)


@dataclass
class _Forked:
    """A rank: its process, a descriptor that tells its end, and the socket that its starter waits at."""

    pid: int
    ended: int
    end: socket.socket
    over: bool = False


def main() -> None:
    # From Python 3.12 on, a fork warns if there are other threads. The libraries' threads wait for work, and a fork starts its own.
    warnings.filterwarnings("ignore", ".*multi-threaded", DeprecationWarning)
    gc.disable()  # the libraries' objects are no garbage
    _import_core()
    gc.freeze()  # so that a collection in a fork copies none of their pages
    asked = socket.socket(fileno=int(sys.argv[1]))
    with selectors.DefaultSelector() as waiting:
        waiting.register(asked, selectors.EVENT_READ)
        while True:
            for ready, _ in waiting.select():
                if ready.fileobj is asked:
                    message, given, _, _ = socket.recv_fds(asked, _LONGEST, 2)
                    if not message:
                        os._exit(0)  # the forks get SIGKILL
                    _fork(message.decode(), given, waiting)
                elif isinstance(ready.data, _Forked):
                    _attend(ready.data, waiting)


def _import_core() -> None:
    """Import what a rank's first task would import.

    By name: nothing here uses these modules, and the core is above this package.
    """
    for name in _IMPORTED:
        importlib.import_module(name)


def _fork(visible: str, given: list[int], waiting: selectors.BaseSelector) -> None:
    connection, end = given
    parent = os.getpid()
    pid = os.fork()
    if not pid:
        _become_member(visible, connection, parent)
    os.close(connection)
    forked = _Forked(pid, os.pidfd_open(pid), socket.socket(fileno=end))
    forked.end.send(str(pid).encode())
    for source in (forked.ended, forked.end):
        waiting.register(source, selectors.EVENT_READ, forked)


def _become_member(visible: str, connection: int, parent: int) -> NoReturn:
    """Run a rank's program as if it were this process's own."""
    try:
        _end_with(parent)
        os.closerange(3, connection)
        os.closerange(connection + 1, os.sysconf("SC_OPEN_MAX"))
        if visible != "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
            if _can_use_no_gpu():
                os.set_inheritable(connection, True)
                os.execv(sys.executable, [sys.executable, "-P", "-m", member.__name__, str(connection)])  # noqa: S606 - it is this interpreter
        gc.enable()
        member.main(connection)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(1)


def _end_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)  # it ended before the kernel was asked


def _can_use_no_gpu() -> bool:
    """Whether CUDA ran in the process that this one was forked from: a library has looked for GPUs while it was imported."""
    import torch

    return torch.cuda._is_in_bad_fork()


def _attend(forked: _Forked, waiting: selectors.BaseSelector) -> None:
    """Report the end of a fork, or kill it if its starter wants that."""
    if forked.over:
        return  # both of its descriptors were ready in the same round
    pid, status = os.waitpid(forked.pid, os.WNOHANG)
    if not pid:
        os.kill(forked.pid, signal.SIGKILL)
        _, status = os.waitpid(forked.pid, 0)
    forked.over = True
    for source in (forked.ended, forked.end):
        waiting.unregister(source)
    with suppress(OSError):  # its starter has gone
        forked.end.send(str(os.waitstatus_to_exitcode(status)).encode())
    forked.end.close()
    os.close(forked.ended)


if __name__ == "__main__":
    main()
