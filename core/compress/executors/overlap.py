"""The threads of a sweep, which read, compute, write and flush at the same time.

There is one *worker* for each of the context's threads. A worker takes the next chunk, reads it into a buffer of its own, computes, and
writes the result to its place in the shard. The header fixes that place, so the bytes don't depend on the order of the workers. One
*reader* asks the kernel to read the next chunks ahead. The calling thread flushes written data, commits finished shards and reports
progress.
"""

import math
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.executors.rewrite import Effect, Rewrite, becomes
from nightpress.core.compress.grids.workspace import Workspace
from nightpress.core.compress.model.checkpoint import TORCH_DTYPES, Shard, ShardWriter, StoredTensor, tensor_bytes
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.header import TensorInfo

#: Weights in a chunk: enough to hide the interpreter's cost, few enough for the processor's caches.
_CHUNK_WEIGHTS = 512 * 1024
_COPY_BYTES = 2 * 1024**2
_AHEAD_BYTES = 64 * 1024**2  #: distance of the reader before the workers
_ADVISE_BYTES = 1024**2  #: for one posix_fadvise: the kernel silently shortens longer ranges
_FLUSH_BYTES = 32 * 1024**2
_REPORT_S = 0.5


@dataclass(frozen=True)
class Chunk:
    """Some rows of a tensor that is rewritten, or some bytes of a tensor that is copied."""

    stored: StoredTensor
    rewrite: Rewrite | None
    first: int  #: row, or byte
    count: int  #: rows, or bytes
    offset: int  #: in the source file
    size: int  #: bytes


@dataclass
class ShardJob:
    """A shard that is being processed."""

    shard: Shard
    chunks: list[Chunk]
    writer: ShardWriter | None = None
    source: int = -1
    effects: list[Effect | None] = field(default_factory=list)  #: by chunk, so that the order of their sum is fixed
    remaining: int = 0
    written: int = 0  #: bytes since the last flush


def plan_shard(shard: Shard, choose: Callable[[TensorInfo], Rewrite | None], *, copies: bool = True) -> ShardJob:
    """Divide a shard into chunks: rows of tensors that are rewritten, bytes of tensors that are copied.

    choose: returns the rewrite of a tensor; None: copy it. copies False: leave out tensors without a rewrite.
    """
    chunks: list[Chunk] = []
    for stored in shard.tensors:
        rewrite = choose(stored.info)
        if rewrite is not None:
            rows, columns = stored.info.shape[0], math.prod(stored.info.shape[1:])
            step = max(1, _CHUNK_WEIGHTS // max(1, columns) // rewrite.row_step) * rewrite.row_step
            unit = stored.info.size // rows
        elif copies:
            rows, step, unit = stored.info.size, _COPY_BYTES, 1
        else:
            continue
        chunks += [
            Chunk(stored, rewrite, first, count := min(step, rows - first), stored.offset + first * unit, count * unit)
            for first in range(0, rows, step)
        ]
    return ShardJob(shard=shard, chunks=chunks, effects=[None] * len(chunks), remaining=len(chunks))


class Sweep:
    """The threads of one sweep and their shared state. `target` None: nothing is written."""

    def __init__(
        self,
        jobs: list[ShardJob],
        context: PassContext,
        target: Path | None,
        commit: Callable[[ShardJob], None],
        span: tuple[float, float],
    ) -> None:
        self._jobs = jobs
        self._context = context
        self._target = target
        self._commit = commit
        self._span = span  #: the sweep's part of the pass's progress: (start, end)
        self._total = sum(chunk.size for job in jobs for chunk in job.chunks)
        self._lock = threading.Lock()  # guards everything below
        self._overseer = threading.Condition(self._lock)
        self._reader = threading.Condition(self._lock)
        # The number of taken bytes at which a worker wakes the reader. Above the total while the reader is awake.
        self._reader_waits_for = self._total + 1
        self._chunks = self._in_order()
        self._taken = 0  # bytes
        self._done = 0
        self._ready: list[ShardJob] = []  # shards of which every chunk is written
        self._open: list[ShardJob] = []
        self._error: BaseException | None = None
        self._stop = False

    def run(self) -> None:
        threads = [
            threading.Thread(target=self._guard, args=(work,), name=name, daemon=True)
            for name, work in [("stream-reader", self._read_ahead)]
            + [(f"stream-worker-{n}", self._work) for n in range(max(1, self._context.threads))]
        ]
        torch_threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the workers already use all threads
        try:
            for thread in threads:
                thread.start()
            self._oversee()
        finally:
            self._end(None)
            for thread in threads:
                thread.join()
            for job in list(self._open):
                self._close(job)
            torch.set_num_threads(torch_threads)

    def _oversee(self) -> None:
        """Flush, commit and report until all shards are done. Raises the first error of any thread."""
        remaining = len(self._jobs)
        while remaining:
            with self._lock:
                self._overseer.wait_for(lambda: self._error or self._ready or self._unflushed(), timeout=_REPORT_S)
                if self._error:
                    raise self._error
                ready, self._ready = self._ready, []
                flush = self._unflushed()
                fraction = self._done / max(1, self._total)
            if flush is not None and flush not in ready:
                flush.written = 0
                assert flush.writer is not None
                flush.writer.flush()
            for job in ready:
                self._commit(job)
                self._close(job)
                remaining -= 1
            start, end = self._span
            message = "counting magnitudes" if self._target is None else "rewriting weights"
            self._context.progress(start + (end - start) * fraction, message)

    def _unflushed(self) -> ShardJob | None:
        return next((job for job in self._open if job.written >= _FLUSH_BYTES), None)

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # it is raised again in the calling thread
            self._end(error)

    def _end(self, error: BaseException | None) -> None:
        with self._lock:
            self._error = self._error or error
            self._stop = True
            self._overseer.notify()
            self._reader.notify()

    def _work(self) -> None:
        workspace = Workspace()
        while True:
            with self._lock:
                step = None if self._stop else next(self._chunks, None)
                if step is None:
                    return
                job, index, chunk = step
                self._taken += chunk.size
                if self._taken >= self._reader_waits_for:
                    self._reader.notify()
            effect, written = self._process(job, chunk, workspace)
            with self._lock:
                job.effects[index] = effect
                job.remaining -= 1
                job.written += written
                self._done += chunk.size
                if job.remaining == 0:
                    self._ready.append(job)
                if job.remaining == 0 or job.written >= _FLUSH_BYTES:
                    self._overseer.notify()

    def _process(self, job: ShardJob, chunk: Chunk, workspace: Workspace) -> tuple[Effect | None, int]:
        raw = workspace.take("raw", (chunk.size,), torch.uint8)
        _read(job.source, tensor_bytes(raw), chunk.offset, job.shard.path)
        if chunk.rewrite is None:
            assert job.writer is not None
            job.writer.write(chunk.stored.name, chunk.first, tensor_bytes(raw))
            return None, chunk.size
        info = chunk.stored.info
        written = 0

        def put(name: str, at: int, data: Tensor) -> None:
            nonlocal written
            assert job.writer is not None
            view = tensor_bytes(data)
            job.writer.write(name, at, view)
            written += len(view)

        rows = raw.view(TORCH_DTYPES[info.dtype]).view(chunk.count, -1)
        try:
            return chunk.rewrite(rows, chunk.first, put, workspace), written
        except NightpressError as error:
            if error.code is ErrorCode.NUMERICAL_FAILURE:
                error.message = f"{info.name}: {error.message}"
                error.details.setdefault("tensor", info.name)
            raise

    def _in_order(self) -> Iterator[tuple[ShardJob, int, Chunk]]:
        """Every chunk, shard after shard. Opens a shard's files before its first chunk. The caller holds the lock."""
        for job in self._jobs:
            job.source = os.open(job.shard.path, os.O_RDONLY | os.O_CLOEXEC)
            self._open.append(job)
            if self._target is not None:
                outputs = _outputs(job)
                job.writer = ShardWriter(self._target / job.shard.path.name, outputs, job.shard.metadata)
            if not job.chunks:
                self._ready.append(job)
            for index, chunk in enumerate(job.chunks):
                yield job, index, chunk

    def _close(self, job: ShardJob) -> None:
        with self._lock:
            self._open.remove(job)
        os.close(job.source)
        if job.writer is not None:
            job.writer.abandon()

    def _read_ahead(self) -> None:
        """Make the kernel read up to a fixed distance before the workers, across shards."""
        asked = 0
        for job in self._jobs:
            handle = os.open(job.shard.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                for chunk in job.chunks:
                    end = chunk.offset + chunk.size
                    for at in range(chunk.offset, end, _ADVISE_BYTES):
                        os.posix_fadvise(handle, at, min(_ADVISE_BYTES, end - at), os.POSIX_FADV_WILLNEED)
                    asked += chunk.size
                    if asked > self._taken + _AHEAD_BYTES and not self._wait_until_taken(asked - _AHEAD_BYTES // 2):
                        return
            finally:
                os.close(handle)

    def _wait_until_taken(self, taken: int) -> bool:
        """Sleep until the workers have taken so many bytes. Returns False if they stopped."""
        with self._lock:
            self._reader_waits_for = taken
            self._reader.wait_for(lambda: self._stop or self._taken >= taken)
            self._reader_waits_for = self._total + 1  # the reader is awake: no worker needs to notify it
            return not self._stop


def _outputs(job: ShardJob) -> list[TensorInfo]:
    rewrites = {chunk.stored.name: chunk.rewrite for chunk in job.chunks}
    return [out for stored in job.shard.tensors for out in becomes(stored.info, rewrites.get(stored.name))]


def _read(source: int, into: memoryview, offset: int, path: Path) -> None:
    while len(into):
        count = os.preadv(source, [into], offset)
        if count == 0:
            raise NightpressError(
                ErrorCode.MALFORMED_MODEL,
                f"{path.name} became shorter while it was read.",
                hint="Leave the model's files alone while a job runs.",
            )
        into, offset = into[count:], offset + count
