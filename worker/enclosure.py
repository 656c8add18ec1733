"""A process inside the sandbox, and the process outside that watches it.

No process inside can see, signal or trace the outer process. The outer process controls the first process of the PID namespace: when
this first process ends, the kernel kills every process inside.
"""

import contextlib
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import psutil

from nightpress.worker import kernel, sandbox, walls
from nightpress.worker.walls import Walls


class Enclosure:
    """The process that `enclose` started, as the outer process sees it."""

    def __init__(self, pid: int, init: "_Init | None") -> None:
        self.pid = pid
        self._init = init
        self._status: int | None = None

    def wait(self) -> int:
        """Wait for the process to end. Returns its status in the form of waitpid(2)."""
        if self._status is None:
            _, self._status = os.waitpid(self.pid, 0)
        return self._status

    def end(self) -> None:
        """Kill the process and everything it started.

        With a PID namespace, killing its first process is enough. Without one, all descendants are searched and killed.
        """
        if self._status is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()  # a namespace ends only after its last zombie was reaped
        if self._init is not None:
            self._init.end()
        else:
            _kill_descendants()


def enclose(job_dir: Path, work: Callable[[Walls], NoReturn], *, network: bool) -> Enclosure:
    """Start a process that builds the sandbox around itself and then calls `work`. The calling process must have a single thread."""
    os.chdir("/")
    namespaces = walls.leave(network=network)
    init = _Init() if namespaces.has(kernel.CLONE_NEWPID) else None
    outside = os.getpid()
    pid = os.fork()
    if pid:
        return Enclosure(pid, init)
    try:
        if init is not None:
            init.forget()
        else:
            sandbox.die_with_parent(signal.SIGKILL)
            if os.getppid() != outside:
                os._exit(0)  # the parent died before the kernel was asked for the signal
        work(walls.build(job_dir, namespaces, network=network))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(os.EX_SOFTWARE)


class _Init:
    """The first process of a PID namespace. It reaps zombies.

    It ends when the outer process ends, because its pipe then closes. When it ends, the kernel kills every process of the namespace.
    """

    def __init__(self) -> None:
        theirs, self._mine = os.pipe()
        self._pid = os.fork()
        if self._pid:
            os.close(theirs)
            return
        try:
            sandbox.hide_memory()
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
            os.dup2(theirs, 0)
            os.closerange(1, os.sysconf("SC_OPEN_MAX"))  # readers of pipes that it holds open would never see the end
            os.read(0, 1)
        finally:
            os._exit(0)

    def forget(self) -> None:
        """Close this process's copy of the end of the pipe that must close when the outer process ends."""
        os.close(self._mine)

    def end(self) -> None:
        """Kill the namespace. Returns when none of its processes is left."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, 0)


def _kill_descendants() -> None:
    """Kill all descendants. Orphans become children of this process, so that all are found."""
    me, left = psutil.Process(), True
    while left:
        left = False
        for descendant in me.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if descendant.status() != psutil.STATUS_ZOMBIE:
                    descendant.kill()
                    left = True
