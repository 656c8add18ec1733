"""The program of a rank. It waits for tasks on a socket, and ends with its starter. nursery.py runs it in a fork, or as
`python -m nightpress.core.compress.ranks.member FD`.
"""

import contextlib
import faulthandler
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

from nightpress.core.compress.ranks.messages import HEARTBEAT_S, Alive, Begin, Done, Failed, Task, Told


class _Starter:
    """The process that started this one. Messages may be sent by several threads."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock = connection, threading.Lock()
        self._tasks: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def listen(self) -> None:
        """Take messages in a thread of its own, so that this process ends with its starter whatever it does."""
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                self._tasks.put(self._connection.recv_bytes())
        os._exit(0)

    def next(self) -> bytes:
        """Wait for the next message."""
        return self._tasks.get()

    def send(self, message: object) -> None:
        data = pickle.dumps(message)
        with self._lock:
            self._connection.send_bytes(data)


class _Heartbeat:
    """Tells the starter every few seconds that this process is not stopped."""

    def __init__(self, starter: _Starter) -> None:
        self._starter, self._end = starter, threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def _beat(self) -> None:
        while not self._end.wait(HEARTBEAT_S):
            with contextlib.suppress(OSError):
                self._starter.send(Alive())

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


def main(descriptor: int) -> None:
    """Run tasks until the starter closes its end of the connection. descriptor: this process's end."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # `Ranks.show_stacks`
    starter = _Starter(Connection(descriptor))
    starter.listen()
    try:
        with _Heartbeat(starter):
            begin = _loads(starter.next())
            _meet(begin)
        while True:
            task = starter.next()
            with _Heartbeat(starter):
                done = _work(_loads(task), begin, starter)
            starter.send(done)
    except BaseException as error:
        traceback.print_exc()
        from nightpress.core.compress.ranks.group import PeerError

        with contextlib.suppress(OSError):
            starter.send(Failed.of(error, of_peers=isinstance(error, PeerError)))
        sys.stderr.flush()
        os._exit(1)  # without cleaning up: other threads may wait for processes that have ended


def _loads(message: bytes) -> Any:
    """Unpickle a message of the process that started this one. That may import the whole core."""
    return pickle.loads(message)  # noqa: S301


def _meet(begin: Begin) -> None:
    """Find the other ranks. The file of the rendezvous needs no port that is known in advance."""
    import torch
    from torch import distributed as dist
    from torch.distributed import FileStore  # type: ignore[attr-defined]  # torch exports it under this name

    from nightpress.core.compress.ranks.group import Group, PeerError

    cuda = begin.device == "cuda"
    if cuda:
        torch.cuda.set_device(0)  # CUDA_VISIBLE_DEVICES shows this rank's GPU alone
    patience = timedelta(seconds=begin.timeout_s)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=FileStore(str(begin.meeting), begin.size),
            rank=begin.rank,
            world_size=begin.size,
            timeout=patience,
        )
        group = Group(begin.rank, begin.size)
        group.collect(None)
        if cuda:  # NCCL connects at its first use: here, where a failure is told apart from one of the work
            group.sum(torch.ones(1, device="cuda"))
            torch.cuda.synchronize()
    except RuntimeError as error:
        raise PeerError(f"The processes did not find each other: {error}") from error


def _work(task: Task, begin: Begin, starter: _Starter) -> Done:
    import torch

    from nightpress.core.compress.ranks.group import Group

    cuda = begin.device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()

    def tell(name: str, *args: object) -> None:
        if begin.rank == 0:
            starter.send(Told(name, args))

    group = Group(begin.rank, begin.size)
    result = task.function(*task.args, group=group, tell=tell)
    group.collect(None)  # so that no rank says that it is done before all are
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    if cuda:
        torch.cuda.empty_cache()
    return Done(result if group.first else None, peak)


if __name__ == "__main__":
    main(int(sys.argv[1]))
