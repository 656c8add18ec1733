"""The thread that writes the shards. It only gets data that no other thread changes."""

import contextlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.executors.blocks.plan import BlockPlan
from nightpress.core.compress.executors.blocks.resume import BlockRecord, RunFiles, record_of
from nightpress.core.compress.executors.blocks.settle import BlockOutcome
from nightpress.core.compress.executors.rewrite import Effect, Rewrite, becomes
from nightpress.core.compress.grids.workspace import Workspace
from nightpress.core.compress.model.checkpoint import SAFETENSORS_DTYPES, ShardWriter, tensor_bytes, tensor_info
from nightpress.core.compress.model.source import SourceTensors


@dataclass(frozen=True)
class BlockOutput:
    """The contents of a block's files."""

    index: int
    tensors: tuple[tuple[str, Tensor], ...]  #: by name, on any device
    record: BlockRecord
    ready: torch.cuda.Event | None  #: when the tensors on a GPU are computed


def block_output(plan: BlockPlan, index: int, tensors: Mapping[str, Tensor], outcome: BlockOutcome) -> BlockOutput:
    """Combine a block's tensors, as they were read, with its settled ones. The result does not keep the dequantized weights in memory.

    tensors: those that this process holds. What other processes hold and have not changed is read from the source.
    """
    found: dict[str, Tensor] = {}
    settled = outcome.written
    for name in plan.skeleton.block_names(index):
        if name in settled:
            found |= settled[name].tensors
        else:
            found[name] = tensors[name] if name in tensors else plan.source.read(name)
    ready = None
    if plan.device.type == "cuda":
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record(torch.cuda.current_stream(plan.device))
    return BlockOutput(index, tuple(found.items()), record_of(outcome), ready)


class BlockWriter:
    """Writes a block while the next one is computed. `write` first waits for the previous block, so at most one is held in memory."""

    def __init__(self, files: RunFiles, context: PassContext) -> None:
        self._files, self._context = files, context
        self._thread = ThreadPoolExecutor(1)
        self._pending: tuple[int, Future[None]] | None = None

    def copy_rest(
        self, source: SourceTensors, names: tuple[str, ...], rewrites: Mapping[str, Rewrite]
    ) -> Future[dict[str, Effect]]:
        """Write the shard of the tensors that are in no block. Every attempt writes it again, which takes little time."""
        return self._thread.submit(_write_rest, self._files, source, names, rewrites)

    def wait(self) -> None:
        """Wait until the last block is on disk, and checkpoint it. Raises what its writing raised."""
        if self._pending is not None:
            index, future = self._pending
            self._pending = None
            future.result()
            self._context.whole(index + 1, self._files.block(index), self._files.record(index))

    def write(self, output: BlockOutput) -> None:
        self.wait()
        self._pending = output.index, self._thread.submit(write_block, self._files, output)

    def __enter__(self) -> "BlockWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()


def write_block(files: RunFiles, output: BlockOutput) -> None:
    """Write a block's shard to disk, then the record that marks it as finished."""
    infos = [
        tensor_info(name, SAFETENSORS_DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in output.tensors
    ]
    with ShardWriter(files.block(output.index), infos) as shard:
        with _beside_the_next_block(output.ready):
            for name, tensor in output.tensors:
                shard.write(name, 0, tensor_bytes(tensor.cpu()))
        shard.commit()
    files.write_record(output.index, output.record)


@contextlib.contextmanager
def _beside_the_next_block(ready: torch.cuda.Event | None) -> Iterator[None]:
    """In this context, copies from a GPU start when `ready` has passed, and neither wait for the next block nor make it wait."""
    if ready is None:
        yield
        return
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_event(ready)
    with torch.cuda.stream(stream):
        yield


def _write_rest(
    files: RunFiles, source: SourceTensors, names: tuple[str, ...], rewrites: Mapping[str, Rewrite]
) -> dict[str, Effect]:
    infos = [info for name in names for info in becomes(source.stored(name).info, rewrites.get(name))]
    effects: dict[str, Effect] = {}
    with ShardWriter(files.rest(), infos) as shard:

        def put(part: str, at: int, tensor: Tensor) -> None:
            shard.write(part, at, tensor_bytes(tensor))

        for name in names:
            if name in rewrites:
                effects[name] = rewrites[name](source.read(name), 0, put, Workspace())
                continue
            for at, piece in source.pieces(name):
                shard.write(name, at, piece)
        shard.commit()
    return effects
