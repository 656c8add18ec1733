"""A child as its supervisor sees it: a process group, a pipe for frames, a pipe for its output, and a pipe for heartbeats."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from nightpress.core.ids import new_id
from nightpress.worker import sandbox, view

CHILD_COMMAND = (sys.executable, "-P", "-m", "nightpress.worker.child")
_TERM_GRACE_S = 1.0
_FORKED_S = 2.0  #: age from which a forked process is taken to use its memory itself


def _anonymous(pid: int) -> int:
    """Bytes of a process's anonymous and shared memory, and of its swap. 0 if it has ended."""
    found = 0
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(("RssAnon:", "RssShmem:", "VmSwap:")):
                found += int(line.split()[1]) * 1024
    return found


def _families(processes: Sequence[psutil.Process]) -> dict[int, list[psutil.Process]]:
    """PID of a process → all that come of it by forks alone: they run its program, with pages that they all hold."""
    first: dict[int, int] = {}  # of each process, by PIDs: who its family comes of
    found: dict[int, list[psutil.Process]] = {}
    for process in processes:  # parents before their children
        first[process.pid] = process.pid
        with contextlib.suppress(psutil.Error):
            parent = process.parent()
            if parent is not None and parent.pid in first and process.cmdline() == parent.cmdline():
                first[process.pid] = first[parent.pid]
                found.setdefault(first[parent.pid], []).append(process)
    return found


def _counted_twice(first: int, forks: Sequence[psutil.Process], held: Mapping[int, int]) -> int:
    """Bytes of anonymous memory that are counted again in the forks that come of a process. `held` counts all of each of them.

    A young fork is about to run its own program, and has all of its parent's pages until then. Of the older ones, the kernel tells what
    one shares: `Pss_Anon` divides each page by the number of those that hold it. The smallest is asked, for it is asked page by page.
    """
    now = time.time()
    young = [fork.pid for fork in forks if now - fork.create_time() < _FORKED_S]
    found = sum(min(held[pid], held[first]) for pid in young)
    if older := [fork.pid for fork in forks if fork.pid not in young]:
        smallest = min((first, *older), key=lambda pid: held[pid])
        with contextlib.suppress(OSError, KeyError):
            rollup = dict(
                line.split(":", 1) for line in Path(f"/proc/{smallest}/smaps_rollup").read_text().splitlines()[1:]
            )
            own, divided = (int(rollup[name].split()[0]) * 1024 for name in ("Anonymous", "Pss_Anon"))
            family = len(forks) + 1
            found += (own - divided) * family * len(older) // len(forks)
    return found


class ChildProcess:
    """One child, in its own folder. It is started before its job is known, and used for one job."""

    def __init__(
        self,
        root: Path,
        *,
        threads: int,
        network: bool,
        command: Sequence[str] = CHILD_COMMAND,
        vllm_python: Path | None = None,
    ) -> None:
        self.job_dir = root.resolve() / new_id("run")
        self._begun = False
        self._seen: set[psutil.Process] = set()
        with contextlib.ExitStack() as undo, contextlib.ExitStack() as its_ends:
            undo.callback(shutil.rmtree, self.job_dir, ignore_errors=True)
            sandbox.prepare_folder(self.job_dir)
            self.frames, frames_end = os.pipe()
            undo.callback(os.close, self.frames)
            its_ends.callback(os.close, frames_end)
            self.chatter, chatter_end = os.pipe()
            undo.callback(os.close, self.chatter)
            its_ends.callback(os.close, chatter_end)
            flags = ["--keep-network"] if network else []
            options = ["--frames", str(frames_end), *flags, str(self.job_dir)]
            self._process = subprocess.Popen(
                [*command, *options],
                stdin=subprocess.PIPE,
                stdout=chatter_end,
                stderr=chatter_end,
                pass_fds=(frames_end,),
                env=sandbox.child_environment(self.job_dir, threads, vllm_python),
                cwd=self.job_dir,
                start_new_session=True,
            )
            undo.pop_all()

    @property
    def pid(self) -> int:
        return self._process.pid

    def alive(self) -> bool:
        return self._process.poll() is None

    def begin(self, patience_s: float) -> None:
        """Let the child start its job. It ends itself if it gets no heartbeat for `patience_s` seconds."""
        self._write(json.dumps({"patience_s": patience_s}).encode() + b"\n")
        self._begun = True

    def beat(self) -> None:
        """Send a heartbeat: the lease is still held. Nothing is sent before `begin`, because the child expects its first line then."""
        if self._begun:
            self._write(b".")

    def _write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # the child has ended; the reader of its frames finds the cause
            self._process.stdin.write(data)
            self._process.stdin.flush()

    def wait(self, timeout: float) -> int | None:
        """The exit status, negative for a signal, or None if the child still runs after `timeout` seconds."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def anonymous_memory(self) -> int:
        """Bytes of anonymous memory of the child and its descendants: the memory that no file on disk backs, which the limit is for.

        Shared memory is counted twice: as files in the child's own /dev/shm, and as pages that processes map.
        """
        descendants = self._descendants()
        held = {process.pid: _anonymous(process.pid) for process in descendants}
        twice = sum(_counted_twice(pid, forks, held) for pid, forks in _families(descendants).items())
        return self._shared_memory() + _anonymous(self.pid) + sum(held.values()) - twice

    def _shared_memory(self) -> int:
        """Bytes in the child's own /dev/shm, whether mapped or not, named or not; 0 if it has none of its own."""
        shared = Path(f"/proc/{self.pid}/root{view.SHARED_MEMORY}")
        with contextlib.suppress(OSError):
            if shared.stat().st_dev != view.SHARED_MEMORY.stat().st_dev:
                space = os.statvfs(shared)
                return (space.f_blocks - space.f_bfree) * space.f_frsize
        return 0

    def _descendants(self) -> list[psutil.Process]:
        """All running descendants, whatever their session. The child adopts orphans, so that these are found too."""
        with contextlib.suppress(psutil.NoSuchProcess):
            found = psutil.Process(self.pid).children(recursive=True)
            self._seen.update(found)
            return found
        return []

    def kill(self) -> None:
        """End the child and all its descendants: SIGTERM first, then SIGKILL.

        If the child has died by itself, its descendants are known from earlier calls of `_descendants`.
        """
        self._descendants()
        if self.alive():
            self._signal(signal.SIGTERM)
            self.wait(_TERM_GRACE_S)
        self._descendants()
        self._signal(signal.SIGKILL)  # also processes that it left in its group
        for descendant in self._seen:
            # If another process has the PID by now, psutil raises NoSuchProcess and does not kill it.
            with contextlib.suppress(psutil.NoSuchProcess):
                descendant.kill()
        self._process.wait()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def remove(self) -> None:
        """Close the pipes, and delete the folder with its contents."""
        for end in (self.frames, self.chatter):
            with contextlib.suppress(OSError):
                os.close(end)
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        shutil.rmtree(self.job_dir, ignore_errors=True)
