"""A process within walls and the process outside that watches over it.

The outer process stays where nothing inside can see, signal or trace it. It holds the first process of the PID namespace, and
with it the life of everything inside.
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
    """What `enclose` started, as the process outside sees it."""

    def __init__(self, pid: int, init: "_Init | None") -> None:
        self.pid = pid
        self._init = init
        self._status: int | None = None

    def wait(self) -> int:
        """Its status, as waitpid(2) tells it, once it has ended."""
        if self._status is None:
            _, self._status = os.waitpid(self.pid, 0)
        return self._status

    def end(self) -> None:
        """Kill it and everything it started. A PID namespace ends with its first process; else all are looked for."""
        if self._status is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()  # a namespace does not end before the last of its dead is buried
        if self._init is not None:
            self._init.end()
        else:
            _kill_descendants()


def enclose(job_dir: Path, work: Callable[[Walls], NoReturn], *, network: bool) -> Enclosure:
    """Start a process that builds the walls around itself and then does `work`. This process must have a single thread."""
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
                os._exit(0)  # it died before that was asked for
        work(walls.build(job_dir, namespaces, network=network))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(os.EX_SOFTWARE)


class _Init:
    """The first process of a PID namespace: it buries the dead, and takes all with it when it ends, as it does when the
    process outside ends."""

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
            os.closerange(1, os.sysconf("SC_OPEN_MAX"))  # what it holds open would never come to its end
            os.read(0, 1)
        finally:
            os._exit(0)

    def forget(self) -> None:
        """Let go of the end that must close with the process outside."""
        os.close(self._mine)

    def end(self) -> None:
        """Returns when nothing of the namespace is left."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, 0)


def _kill_descendants() -> None:
    """Orphans come back to this process, so each is found below it."""
    me, left = psutil.Process(), True
    while left:
        left = False
        for descendant in me.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if descendant.status() != psutil.STATUS_ZOMBIE:
                    descendant.kill()
                    left = True
