"""Starts the processes that compute one model together, runs functions in them, and ends them."""

import contextlib
import os
import pickle
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from nightpress.core.compress.ranks.forks import Fork, fork
from nightpress.core.compress.ranks.messages import Alive, Begin, Done, Failed, Task, Told
from nightpress.core.errors import ErrorCode, NightpressError

_TICK_S = 1.0
_GRACE_S = 2.0  #: after the first error: time in which other ranks may report the cause


@dataclass
class _Rank:
    number: int
    process: Fork
    connection: Connection
    heard: float = field(default_factory=time.monotonic)  #: when its last message came
    done: Done | None = None
    failed: Failed | None = None

    @property
    def over(self) -> bool:
        return self.done is not None or self.failed is not None or self.connection.closed


class Ranks:
    """`size` processes. They start with the first `run`, and again after an error."""

    def __init__(
        self,
        size: int,
        folder: Path,
        *,
        device: str = "cpu",
        threads: int = 1,
        timeout_s: float = 600.0,
        silence_s: float = 120.0,
    ) -> None:
        """folder: for the file of the rendezvous. threads: CPU threads of all processes together.

        timeout_s: longest wait of a rank for the others. silence_s: a rank that says nothing for so long counts as stopped.
        """
        self.size, self.device, self.threads = size, device, max(1, threads // size)
        self.peak_gpu_bytes = 0  #: the largest peak of a rank's GPU so far
        self._folder, self._timeout_s, self._silence_s = folder, timeout_s, silence_s
        self._ranks: list[_Rank] = []
        self._started = 0

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """The process ids of the ranks that run, by rank."""
        return [rank.process.pid for rank in self._ranks]

    def run(self, function: Callable[..., Any], *args: Any, told: Callable[[str, tuple[Any, ...]], None]) -> Any:
        """Call function(*args, group=…, tell=…) in all processes. Returns the first rank's result.

        `told` gets what the first rank tells: tell(name, …). Raises the error of a rank, NightpressError(worker_lost) if one has ended, and
        NightpressError(stalled) if one has stopped. Then no rank runs any more.
        """
        task = pickle.dumps(Task(function, args))
        try:
            if not self._ranks:
                self._start()
            for rank in self._ranks:
                rank.done, rank.heard = None, time.monotonic()
                with contextlib.suppress(OSError):  # it has ended, which `_listen` finds
                    rank.connection.send_bytes(task)
            self._listen(told)
        except BaseException:
            self.close()
            raise
        results = [rank.done for rank in self._ranks]
        self.peak_gpu_bytes = max(self.peak_gpu_bytes, *(done.peak_gpu_bytes for done in results if done is not None))
        first = results[0]
        assert first is not None
        return first.result

    def show_stacks(self) -> None:
        """Let all processes write to stderr where each of their threads is: of use before a run that hangs is ended."""
        for rank in self._ranks:
            rank.process.send_signal(signal.SIGUSR1)

    def close(self) -> None:
        """End all processes. Returns when none is left."""
        for rank in self._ranks:
            rank.process.kill()  # a stopped process can't end by itself
        for rank in self._ranks:
            rank.process.wait()
            rank.connection.close()
        self._ranks = []

    def _start(self) -> None:
        self._started += 1
        self._folder.mkdir(parents=True, exist_ok=True)
        meeting = self._folder / f"meeting-{os.getpid()}-{self._started}"
        meeting.unlink(missing_ok=True)
        visible = visible_gpus(self.size) if self.device == "cuda" else ["cpu"] * self.size
        for number in range(self.size):
            ours, theirs = Pipe()
            with theirs:
                process = fork(theirs, threads=self.threads, visible=visible[number])
            self._ranks.append(_Rank(number, process, ours))
            with contextlib.suppress(OSError):
                begin = Begin(number, self.size, meeting, self.device, self._timeout_s)
                ours.send_bytes(pickle.dumps(begin))

    def _listen(self, told: Callable[[str, tuple[Any, ...]], None]) -> None:
        """Take messages until all ranks are done. Raises the error of the rank that caused it."""
        gives_up: float | None = None
        while waiting := [rank for rank in self._ranks if not rank.over]:
            ready = wait([rank.connection for rank in waiting], _TICK_S if gives_up is None else 0.1)
            now = time.monotonic()
            for rank in waiting:
                if rank.connection in ready:
                    rank.heard = now
                    self._take(rank, told)
            silent = any(now - rank.heard > self._silence_s for rank in waiting if not rank.over)
            if gives_up is None and (silent or any(rank.failed or rank.connection.closed for rank in self._ranks)):
                gives_up = now + _GRACE_S
            if gives_up is not None and now > gives_up:
                break
        if gives_up is not None:
            raise self._cause()

    def _take(self, rank: _Rank, told: Callable[[str, tuple[Any, ...]], None]) -> None:
        try:
            message = pickle.loads(rank.connection.recv_bytes())  # noqa: S301 - of a process that this one started
        except (EOFError, OSError):
            rank.connection.close()
            return
        match message:
            case Told():
                told(message.name, message.args)
            case Done():
                rank.done = message
            case Failed():
                rank.failed = message
            case Alive():
                pass

    def _cause(self) -> BaseException:
        """The error that ended the run: a rank's own one before the errors of those that waited for it."""
        failed = [rank for rank in self._ranks if rank.failed is not None]
        for rank in failed:
            assert rank.failed is not None
            if not rank.failed.of_peers:
                return rank.failed.exception()
        ended = [(rank, _status(rank)) for rank in self._ranks if rank.connection.closed and rank not in failed]
        # NCCL ends a process that waited too long by SIGABRT.
        ended.sort(key=lambda pair: pair[1] == -signal.SIGABRT)
        for rank, status in ended:
            how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
            return NightpressError(
                ErrorCode.WORKER_LOST,
                f"Process {rank.number + 1} of the {self.size} that compute the model {how}.",
                hint="The job's log has its last words.",
                status=status,
                signal=-status if status < 0 else None,
            )
        longest = min((rank for rank in self._ranks if not rank.over), key=lambda rank: rank.heard, default=None)
        if longest is not None:
            said = f"Process {longest.number + 1} of the {self.size} that compute the model has stopped: it did not answer in time."
        else:
            why = next(rank.failed.exception() for rank in failed if rank.failed is not None)
            said = f"The {self.size} processes that compute the model waited for each other in vain: {why}"
        return NightpressError(ErrorCode.STALLED, said, hint="The job's log shows what it was at.")


def _status(rank: _Rank) -> int:
    """How a rank ended, whose connection is closed."""
    try:
        return rank.process.wait(_GRACE_S)
    except TimeoutError:
        rank.process.kill()
        return rank.process.wait()


def can_meet() -> bool:
    """Whether processes here may connect to each other by TCP on the loopback device, which gloo and NCCL need."""
    try:
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            listening.listen(1)
            with socket.create_connection(listening.getsockname(), timeout=5.0):
                return True
    except OSError:
        return False


def visible_gpus(size: int) -> Sequence[str]:
    """CUDA_VISIBLE_DEVICES of each of `size` processes: one of the GPUs that this process sees."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(number) for number in range(size)]
    found = [entry.strip() for entry in named.split(",") if entry.strip()]
    if len(found) < size:
        raise NightpressError(
            ErrorCode.INTERNAL, f"The job runs in {size} processes, but sees {len(found)} GPUs: {named or 'none'}."
        )
    return found[:size]
