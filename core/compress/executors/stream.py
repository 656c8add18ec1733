"""The stream executor: a model folder swept in chunks of rows, whatever its size, into another folder.

Three kinds of threads overlap. *Workers*, one a core, each take the next chunk, read it into a buffer of their own, compute, and write
the result where the shard's header says it goes; so the bytes don't depend on which worker was faster. One *reader* asks the
kernel for what comes next. The calling thread flushes what was written, commits finished shards and reports progress.
"""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from core.compress.checkpoint import (
    INDEX_FILE,
    TORCH_DTYPES,
    Shard,
    ShardWriter,
    StoredTensor,
    disk_errors,
    read_shards,
    write_file,
    write_index,
)
from core.compress.passes.context import PassContext
from core.compress.solvers.grid import Workspace
from core.errors import ErrorCode, NightpressError
from core.recipes.header import TensorInfo

_CHUNK_WEIGHTS = 512 * 1024  #: weights a chunk: large enough to hide the interpreter, small enough for the caches
_COPY_BYTES = 2 * 1024**2
_AHEAD_BYTES = 64 * 1024**2  #: how far the reader runs before the workers
_ADVISE_BYTES = 1024**2  #: the kernel silently cuts longer advice short
_FLUSH_BYTES = 32 * 1024**2
_REPORT_S = 0.5

#: (output tensor's name, byte offset in it, its bytes)
Put = Callable[[str, int, Tensor], None]


@dataclass(frozen=True)
class Effect:
    """What a rewrite did to a chunk, or to a tensor: sums, so that they add up."""

    squared_error: float = 0.0  #: Σ (w − ŵ)²
    squared_norm: float = 0.0  #: Σ w²
    zeros: int = 0

    def __add__(self, other: "Effect") -> "Effect":
        return Effect(
            self.squared_error + other.squared_error, self.squared_norm + other.squared_norm, self.zeros + other.zeros
        )

    @property
    def relative_error(self) -> float:
        """‖w − ŵ‖ / ‖w‖; 0 for a tensor of zeros, which any grid holds."""
        return (self.squared_error / self.squared_norm) ** 0.5 if self.squared_norm else 0.0


class Rewrite(Protocol):
    """What becomes of one tensor. Called by several threads at once, each with its own workspace."""

    @property
    def outputs(self) -> tuple[TensorInfo, ...]: ...

    @property
    def row_step(self) -> int:
        """Chunks start at multiples of it."""

    def __call__(self, rows: Tensor, first_row: int, put: Put, workspace: Workspace) -> Effect: ...


@dataclass(frozen=True)
class Swept:
    """What a sweep did, by source tensor, in the order of the files."""

    effects: dict[str, Effect]
    outputs: dict[str, tuple[TensorInfo, ...]]


@dataclass(frozen=True)
class _Chunk:
    """Some rows of one tensor, or some bytes of one that is copied."""

    stored: StoredTensor
    rewrite: Rewrite | None
    first: int  #: row, or byte
    count: int  #: rows, or bytes
    offset: int  #: in the source file
    size: int  #: bytes


@dataclass
class _Job:
    """One shard under way."""

    shard: Shard
    chunks: list[_Chunk]
    writer: ShardWriter | None = None
    source: int = -1
    effects: list[Effect | None] = field(default_factory=list)  #: by chunk, so that sums are taken in one order
    remaining: int = 0
    written: int = 0  #: bytes since the last flush


def sweep(
    source: Path, target: Path, choose: Callable[[TensorInfo], Rewrite | None], context: PassContext, *, recipe: str
) -> Swept:
    """Rewrite the tensors for which `choose` names how, copy the rest, and leave a whole set of shards with its index in `target`.

    `recipe` says in a word or a JSON what is done: a shard that an earlier attempt finished with the same recipe is not done again.
    """
    target.mkdir(parents=True, exist_ok=True)
    shards = read_shards(source)
    records = context.work_dir / "swept" / hashlib.sha256(f"{recipe}\n{target.name}".encode()).hexdigest()[:16]
    records.mkdir(parents=True, exist_ok=True)
    effects: dict[str, dict[str, Effect]] = {}
    jobs: list[_Job] = []
    for shard in shards:
        done = _finished(records, target, shard)
        if done is None:
            jobs.append(_job(shard, choose))
        else:
            effects[shard.path.name] = done
    finished = len(effects)

    def commit(job: _Job) -> None:
        nonlocal finished
        assert job.writer is not None
        job.writer.commit()
        effects[job.shard.path.name] = _sum_effects(job)
        record = records / f"{job.shard.path.name}.json"
        _record(record, job, effects[job.shard.path.name])
        finished += 1
        context.checkpoint(record.relative_to(context.work_dir).as_posix(), finished)

    _Sweep(jobs, context, target, commit).run()

    outputs = {stored.name: _becomes(stored.info, choose(stored.info)) for shard in shards for stored in shard.tensors}
    if len(shards) > 1 or (source / INDEX_FILE).exists():
        weight_map = {
            out.name: shard.path.name for shard in shards for stored in shard.tensors for out in outputs[stored.name]
        }
        write_index(target, weight_map, sum(out.size for group in outputs.values() for out in group))
    merged = {name: effect for shard in shards for name, effect in effects[shard.path.name].items()}
    return Swept(effects=merged, outputs=outputs)


def scan(
    shards: tuple[Shard, ...],
    wanted: Callable[[TensorInfo], bool],
    visit: Callable[[StoredTensor, int, Tensor, Workspace], None],
    context: PassContext,
) -> None:
    """Show every chunk of the wanted tensors to `visit` (tensor, first row, rows, workspace). Chunks come in any order, from several threads."""
    rewrites = {one.name: _Visit(one, visit) for shard in shards for one in shard.tensors if wanted(one.info)}
    jobs = [_job(shard, lambda info: rewrites.get(info.name), copies=False) for shard in shards]
    _Sweep([job for job in jobs if job.chunks], context, None, lambda _job: None).run()


def copy_companions(source: Path, target: Path) -> None:
    """Copy what belongs to a model beside its weights: config, tokenizer, module descriptions."""
    with disk_errors():
        for path in sorted(source.rglob("*")):
            if path.is_file() and path.suffix != ".safetensors" and path.name != INDEX_FILE:
                copy = target / path.relative_to(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, in place."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # an array is a buffer


@dataclass(frozen=True)
class _Visit:
    """A rewrite that writes nothing."""

    stored: StoredTensor
    visit: Callable[[StoredTensor, int, Tensor, Workspace], None]
    outputs: tuple[TensorInfo, ...] = ()
    row_step: int = 1

    def __call__(self, rows: Tensor, first_row: int, put: Put, workspace: Workspace) -> Effect:
        del put
        self.visit(self.stored, first_row, rows, workspace)
        return Effect()


class _Sweep:
    """The threads of one sweep and what they share. `target` None: nothing is written."""

    def __init__(
        self, jobs: list[_Job], context: PassContext, target: Path | None, commit: Callable[[_Job], None]
    ) -> None:
        self._jobs = jobs
        self._context = context
        self._target = target
        self._commit = commit
        self._total = sum(chunk.size for job in jobs for chunk in job.chunks)
        self._condition = threading.Condition()  # guards everything below
        self._chunks = self._in_order()
        self._taken = 0  # bytes
        self._done = 0
        self._ready: list[_Job] = []  # whose every chunk is written
        self._open: list[_Job] = []
        self._error: BaseException | None = None
        self._stop = False

    def run(self) -> None:
        threads = [
            threading.Thread(target=self._guard, args=(work,), name=name, daemon=True)
            for name, work in [("stream-reader", self._read_ahead)]
            + [(f"stream-worker-{n}", self._work) for n in range(max(1, self._context.threads))]
        ]
        torch_threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the workers are the parallelism
        try:
            for thread in threads:
                thread.start()
            self._oversee()
        finally:
            with self._condition:
                self._stop = True
                self._condition.notify_all()
            for thread in threads:
                thread.join()
            for job in self._open:
                self._close(job)
            torch.set_num_threads(torch_threads)

    def _oversee(self) -> None:
        """Flush, commit and report until all is done. Raises what a thread raised."""
        remaining = len(self._jobs)
        while remaining:
            with self._condition:
                self._condition.wait_for(lambda: self._error or self._ready or self._unflushed(), timeout=_REPORT_S)
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
            self._context.progress(fraction, "sweeping the weights")

    def _unflushed(self) -> _Job | None:
        return next((job for job in self._open if job.written >= _FLUSH_BYTES), None)

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # it is raised again in the calling thread
            with self._condition:
                self._error = self._error or error
                self._stop = True
                self._condition.notify_all()

    def _work(self) -> None:
        workspace = Workspace()
        while True:
            with self._condition:
                step = None if self._stop else next(self._chunks, None)
                if step is None:
                    return
                job, index, chunk = step
                self._taken += chunk.size
                self._condition.notify_all()
            effect, written = self._process(job, chunk, workspace)
            with self._condition:
                job.effects[index] = effect
                job.remaining -= 1
                job.written += written
                self._done += chunk.size
                if job.remaining == 0:
                    self._ready.append(job)
                if job.remaining == 0 or job.written >= _FLUSH_BYTES:
                    self._condition.notify_all()

    def _process(self, job: _Job, chunk: _Chunk, workspace: Workspace) -> tuple[Effect | None, int]:
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

    def _in_order(self) -> Iterator[tuple[_Job, int, _Chunk]]:
        """Every chunk, shard after shard. Called under the lock; opens a shard's files when its first chunk is due."""
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

    def _close(self, job: _Job) -> None:
        with self._condition:
            self._open.remove(job)
        os.close(job.source)
        if job.writer is not None:
            job.writer.abandon()

    def _read_ahead(self) -> None:
        """Keep the kernel reading a fixed distance before the workers, across shards."""
        asked = 0
        for job in self._jobs:
            handle = os.open(job.shard.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                for chunk in job.chunks:
                    end = chunk.offset + chunk.size
                    for at in range(chunk.offset, end, _ADVISE_BYTES):
                        os.posix_fadvise(handle, at, min(_ADVISE_BYTES, end - at), os.POSIX_FADV_WILLNEED)
                    asked += chunk.size
                    if not self._wait_until_taken(asked - _AHEAD_BYTES):
                        return
            finally:
                os.close(handle)

    def _wait_until_taken(self, taken: int) -> bool:
        """Sleep until the workers have come that far. False if they stopped."""
        with self._condition:
            self._condition.wait_for(lambda: self._stop or self._taken >= taken)
            return not self._stop


def _job(shard: Shard, choose: Callable[[TensorInfo], Rewrite | None], *, copies: bool = True) -> _Job:
    chunks: list[_Chunk] = []
    for stored in shard.tensors:
        rewrite = choose(stored.info)
        if rewrite is not None:
            rows, columns = stored.info.shape
            step = max(1, _CHUNK_WEIGHTS // max(1, columns) // rewrite.row_step) * rewrite.row_step
            unit = stored.info.size // rows
        elif copies:
            rows, step, unit = stored.info.size, _COPY_BYTES, 1
        else:
            continue
        chunks += [
            _Chunk(stored, rewrite, first, count := min(step, rows - first), stored.offset + first * unit, count * unit)
            for first in range(0, rows, step)
        ]
    return _Job(shard=shard, chunks=chunks, effects=[None] * len(chunks), remaining=len(chunks))


def _outputs(job: _Job) -> list[TensorInfo]:
    rewrites = {chunk.stored.name: chunk.rewrite for chunk in job.chunks}
    return [out for stored in job.shard.tensors for out in _becomes(stored.info, rewrites.get(stored.name))]


def _becomes(info: TensorInfo, rewrite: Rewrite | None) -> tuple[TensorInfo, ...]:
    return (info,) if rewrite is None else rewrite.outputs


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


def _sum_effects(job: _Job) -> dict[str, Effect]:
    sums: dict[str, Effect] = {}
    for chunk, effect in zip(job.chunks, job.effects, strict=True):
        if effect is not None:
            sums[chunk.stored.name] = sums.get(chunk.stored.name, Effect()) + effect
    return sums


def _record(path: Path, job: _Job, effects: dict[str, Effect]) -> None:
    assert job.writer is not None
    body = {
        "source_header": hashlib.sha256(job.shard.header).hexdigest(),
        "size": job.writer.size,
        "effects": {name: asdict(effect) for name, effect in effects.items()},
    }
    write_file(path, json.dumps(body).encode())


def _finished(records: Path, target: Path, shard: Shard) -> dict[str, Effect] | None:
    """The effects of a shard that an earlier attempt finished. Its record was written after it, so it is whole."""
    record, output = records / f"{shard.path.name}.json", target / shard.path.name
    if not record.exists() or not output.exists():
        return None
    body = json.loads(record.read_bytes())
    if body["source_header"] != hashlib.sha256(shard.header).hexdigest() or body["size"] != output.stat().st_size:
        return None
    return {name: Effect(**one) for name, one in body["effects"].items()}
