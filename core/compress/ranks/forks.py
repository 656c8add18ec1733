"""The process that ranks are forked from, as their starter sees it. See nursery.py.

A process has one for each number of threads that its ranks have. It begins with the first rank, and ends with its starter.
"""

import atexit
import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from multiprocessing.connection import Connection

from nightpress.core.errors import ErrorCode, NightpressError

_PROGRAM = "nightpress.core.compress.ranks.nursery"


class Fork:
    """A rank: what its starter uses of `subprocess.Popen`."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        said = self._told()
        self.pid = int(said or 0)  #: 0: the nursery has ended before it forked
        self._status = None if said else -signal.SIGKILL

    def _told(self) -> bytes:
        """What the nursery tells next, or nothing if it has ended. Raises TimeoutError."""
        try:
            return self._end.recv(32)
        except ConnectionError:
            return b""

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        if self._status is None and not select.select([self._end], [], [], 0)[0]:
            os.kill(self.pid, number)

    def kill(self) -> None:
        with contextlib.suppress(OSError):
            self._end.shutdown(socket.SHUT_WR)  # the nursery kills it, and still tells its status

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait for its end. Returns its status, negative for a signal; −9 as well if the nursery was killed with it. Raises TimeoutError."""
        if self._status is None:
            self._end.settimeout(timeout_s)
            said = self._told()
            self._status = int(said) if said else -signal.SIGKILL
        self._end.close()
        return self._status


class _Nursery:
    """The process, and the socket that it is asked by."""

    def __init__(self, threads: int) -> None:
        self._asking, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", _PROGRAM, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=_environment(threads),
            )

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    def fork(self, connection: Connection, visible: str) -> Fork:
        ours, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with end:
            try:
                socket.send_fds(self._asking, [visible.encode()], [connection.fileno(), end.fileno()])
            except BrokenPipeError as error:
                raise NightpressError(
                    ErrorCode.WORKER_LOST, "The process that starts those which compute the model has ended."
                ) from error
        return Fork(ours)

    def end(self) -> None:
        self._asking.close()
        self._process.kill()
        self._process.wait()


_lock = threading.Lock()
_nurseries: dict[int, _Nursery] = {}  #: by the threads of a rank


@atexit.register
def end_nurseries() -> None:
    """End the processes that ranks are forked from, and all ranks."""
    with _lock:
        while _nurseries:
            _nurseries.popitem()[1].end()


def fork(connection: Connection, *, threads: int, visible: str) -> Fork:
    """Start a rank. It has the environment that this process had when it started the first one, and what is given here.

    connection: the rank's end of the connection to this process. threads: of the rank. visible: its CUDA_VISIBLE_DEVICES, or `cpu`.
    """
    with _lock:
        if threads not in _nurseries or not _nurseries[threads].runs:
            _nurseries[threads] = _Nursery(threads)
        return _nurseries[threads].fork(connection, visible)


def _environment(threads: int) -> dict[str, str]:
    count = str(threads)
    return os.environ | {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
        # Addresses of other devices may be unreachable within the sandbox, and the host's name may have none.
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        # The libraries may look for GPUs while they are imported; through NVML they do it without CUDA.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    }
