"""The blocks executor: a calibrated model, one block in memory at a time, whatever its size.

What enters the first block is captured once for all calibration texts. Then for each block: its weights are read, the texts run through it
while every linear layer's inputs are summed up, the method settles its weights, the texts run through it again as it now is, and it is
written as a shard of its own. Reading the next block and writing the last one overlap with the arithmetic.

A killed attempt resumes behind the last block that was written: the finished blocks are run from their files, and since a block always
runs as its files say it, what follows is the same to the last byte.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import psutil
import torch
from torch import Tensor, nn

from core.compress.checkpoint import (
    SAFETENSORS_DTYPES,
    ShardWriter,
    read_shard,
    read_shards,
    tensor_info,
    write_file,
    write_index,
)
from core.compress.context import PassContext
from core.compress.executors.rewrite import Effect
from core.compress.executors.skeleton import Call, Skeleton, Source
from core.errors import ErrorCode, NightpressError

_BATCH_TOKENS = {"cuda": 16384, "cpu": 2048}  #: enough to fill the device; more only costs memory


class Statistic(Protocol):
    """What a method wants to know of a linear layer's inputs."""

    tokens: int

    def add(self, inputs: Tensor) -> None:
        """Take in [..., columns]."""


@dataclass(frozen=True)
class Settled:
    """A tensor of a block as it will be from now on."""

    weight: Tensor  #: just what a loader makes of `tensors`
    tensors: dict[str, Tensor]  #: what is written, by name, on any device
    effect: Effect | None  #: None if it is no linear weight, but makes up for what was done to one


@dataclass(frozen=True)
class Inputs:
    """What is known of a tensor that some linear layers are given."""

    names: tuple[str, ...]  #: of their weights
    statistic: Statistic


class Method(Protocol):
    """A calibrated method: what it watches, and what it makes of weights."""

    def watch(self, columns: int, device: torch.device) -> Statistic: ...

    def settle(self, block: Mapping[str, Tensor], inputs: Sequence[Inputs], device: torch.device) -> dict[str, Settled]:
        """What becomes of the tensors of a block, given by name in their stored dtype: of all that were watched, and of others if need be."""

    def restore(self, name: str, written: Mapping[str, Tensor]) -> Tensor:
        """A settled linear weight from what was written."""


@dataclass(frozen=True)
class Pressed:
    """What a run did."""

    effects: dict[str, Effect]  #: by weight
    bytes_after: dict[str, int]  #: by weight, of all that was written for it
    unseen: tuple[str, ...]  #: weights that no calibration token reached
    kept: tuple[str, ...]  #: matrices that were copied


def press_blocks(
    source: Path,
    target: Path,
    method: Method,
    ids: Tensor,
    context: PassContext,
    *,
    chosen: frozenset[str],
    recipe: str,
) -> Pressed:
    """Settle the chosen weights of all blocks and copy the rest of the model's tensors; `target` gets its shards and their index.

    ids [samples, length] are whole calibration texts. `recipe` says what is done, so that only blocks made just so are taken over from
    an earlier attempt. If a GPU's memory does not suffice, smaller batches are tried once. Raises NightpressError.
    """
    target.mkdir(parents=True, exist_ok=True)
    tokens = _BATCH_TOKENS[torch.device(context.device).type]
    for share in (1, 4):
        try:
            with torch.no_grad():
                return _Run(source, target, method, ids, context, chosen, recipe, tokens // share).run()
        except torch.cuda.OutOfMemoryError as error:
            if share == 4:
                raise NightpressError(
                    ErrorCode.GPU_OUT_OF_MEMORY,
                    "The GPU's memory does not hold one block of the model with its calibration.",
                    hint="Use fewer or shorter calibration samples, or a larger GPU.",
                ) from error
        torch.cuda.empty_cache()
    raise AssertionError


class _Run:
    def __init__(
        self,
        source: Path,
        target: Path,
        method: Method,
        ids: Tensor,
        context: PassContext,
        chosen: frozenset[str],
        recipe: str,
        batch_tokens: int,
    ) -> None:
        self.target, self.method, self.ids, self.context, self.chosen = target, method, ids, context, chosen
        self.source = Source(read_shards(source))
        self.device = torch.device(context.device)
        self.skeleton = Skeleton(source, self.source, context.device, self._compute_dtype())
        self.batch = max(1, min(len(ids), batch_tokens // ids.shape[1]))
        self.count = len(self.skeleton.blocks)
        digest = hashlib.sha256(f"{recipe}\n{self.batch}\n{target.name}".encode())
        digest.update(ids.numpy().tobytes())
        for shard in self.source.shards:
            digest.update(shard.header)
        self.records = context.work_dir / "blocks" / digest.hexdigest()[:16]
        self.records.mkdir(parents=True, exist_ok=True)
        self.effects: dict[str, Effect] = {}
        self.unseen: list[str] = []

    def run(self) -> Pressed:
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
            rest: Future[None] = writer.submit(self._copy_rest)
            self.context.progress(0.0, "calibrating")
            hidden, calls = self._capture()
            finished = self._finished()
            coming = reader.submit(self._read, 0, finished)
            writing: tuple[int, Future[None]] | None = None
            for index in range(self.count):
                tensors = coming.result()
                if index + 1 < self.count:
                    coming = reader.submit(self._read, index + 1, finished)
                self.context.progress(index / self.count, f"block {index + 1} of {self.count}")
                if index < finished:
                    tensors |= {name: self.method.restore(name, tensors) for name in self._chosen_of(index)}
                    self._forward(self.skeleton.fill_block(index, tensors), index, hidden, calls)
                else:
                    settled = self._press(index, tensors, hidden, calls)
                    self._wait(writing)
                    writing = index, writer.submit(self._write, index, tensors, settled)
                self.skeleton.empty_block(index)
            self._wait(writing)
            rest.result()
        return self._conclude()

    def _compute_dtype(self) -> torch.dtype:
        """On a GPU as the weights are stored; on a CPU in float32, which is faster there than any narrower type."""
        if self.device.type == "cpu":
            return torch.float32
        names = {self.source.stored(name).info.dtype for name in self.chosen}
        return next(
            (dtype for dtype in (torch.float32, torch.bfloat16) if SAFETENSORS_DTYPES[dtype] in names), torch.float16
        )

    # Texts -------------------------------------------------------------------------------------------------------------

    def _capture(self) -> tuple[Tensor, dict[int, list[Call]]]:
        """The hidden states of all texts [samples, length, width], and by batch size what each block is given beside them."""
        hidden: Tensor | None = None
        calls: dict[int, list[Call]] = {}
        at = 0
        for entered, given in self.skeleton.capture(torch.split(self.ids, self.batch)):
            if hidden is None:
                shape = (len(self.ids), *entered.shape[1:])
                hidden = _room_for(shape, entered.dtype, self.device, self.context.work_dir)
            hidden[at : at + len(entered)] = entered
            calls.setdefault(len(entered), given)
            at += len(entered)
        assert hidden is not None
        return hidden, calls

    def _batches(self, hidden: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each batch where it is kept and on the device."""
        for kept in torch.split(hidden, self.batch):
            yield kept, kept.to(self.device, non_blocking=True)

    def _forward(self, block: nn.Module, index: int, hidden: Tensor, calls: dict[int, list[Call]]) -> None:
        """Run all texts through a block; what comes out takes the place of what went in."""
        for kept, batch in self._batches(hidden):
            call = calls[len(batch)][index]
            out = block(batch, *call.args, **call.kwargs)
            kept.copy_(out[0] if isinstance(out, tuple) else out)

    def _chosen_of(self, index: int) -> dict[str, nn.Linear]:
        """The chosen weights of a block by name, with their layers."""
        return {name: one for name, one in self.skeleton.linears(index).items() if name in self.chosen}

    # A block -----------------------------------------------------------------------------------------------------------

    def _press(
        self, index: int, tensors: dict[str, Tensor], hidden: Tensor, calls: dict[int, list[Call]]
    ) -> dict[str, Settled]:
        block = self.skeleton.fill_block(index, tensors)
        linears = self._chosen_of(index)
        inputs = self._watch(block, linears, index, hidden, calls)
        self.unseen += [name for one in inputs if one.statistic.tokens == 0 for name in one.names]
        settled = self.method.settle(tensors, inputs, self.device)
        del inputs
        self.skeleton.fill_block(index, tensors | {name: one.weight for name, one in settled.items()})
        if index + 1 < self.count:
            self._forward(block, index, hidden, calls)
        return settled

    def _watch(
        self,
        block: nn.Module,
        linears: Mapping[str, nn.Linear],
        index: int,
        hidden: Tensor,
        calls: dict[int, list[Call]],
    ) -> list[Inputs]:
        """Sum up the inputs of every linear layer. Layers that are given the very same tensor share a sum."""
        watched = _Watched(self.method, self.device, len(linears))
        handles = [one.register_forward_pre_hook(watched.hook(name)) for name, one in linears.items()]
        handles.append(block.register_forward_pre_hook(watched.next_batch))
        try:
            for _, batch in self._batches(hidden):
                call = calls[len(batch)][index]
                with contextlib.suppress(_EnoughSeen):
                    block(batch, *call.args, **call.kwargs)
        finally:
            for handle in handles:
                handle.remove()
        for name, one in linears.items():
            watched.add_unseen(name, one.in_features)
        return watched.inputs()

    # Files -------------------------------------------------------------------------------------------------------------

    def _shard_name(self, number: int) -> str:
        return f"model-{number + 1:05}-of-{self.count + 1:05}.safetensors"

    def _block_file(self, index: int) -> Path:
        return self.target / self._shard_name(index + 1)

    def _record_file(self, index: int) -> Path:
        return self.records / f"block-{index:05}.json"

    def _read(self, index: int, finished: int) -> dict[str, Tensor]:
        """A block's tensors: as they were, or, of a finished one, as they were written."""
        if index < finished:
            written = Source((read_shard(self._block_file(index)),))
            return {name: written.read(name) for name in written.names()}
        tensors = {name: self.source.read(name) for name in self.skeleton.block_names(index)}
        return {name: one.pin_memory() for name, one in tensors.items()} if self.device.type == "cuda" else tensors

    def _write(self, index: int, tensors: Mapping[str, Tensor], settled: Mapping[str, Settled]) -> None:
        out: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            out |= settled[name].tensors if name in settled else {name: tensor}
        self._write_shard(self._block_file(index), out)
        record = {name: asdict(one.effect) for name, one in settled.items() if one.effect is not None}
        unseen = [name for name in self.unseen if name in settled]
        body = {"size": self._block_file(index).stat().st_size, "effects": record, "unseen": unseen}
        write_file(self._record_file(index), json.dumps(body).encode())

    def _copy_rest(self) -> None:
        """The shard of all tensors outside the blocks. Made anew by every attempt: it takes a moment."""
        inside = tuple(self.skeleton.block_prefix(index) for index in range(self.count))
        names = [name for name in self.source.names() if not name.startswith(inside)]
        infos = [self.source.stored(name).info for name in names]
        with ShardWriter(self.target / self._shard_name(0), infos, {"format": "pt"}) as shard:
            for name in names:
                shard.write(name, 0, _bytes(self.source.read(name)))
            shard.commit()

    def _write_shard(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        infos = [tensor_info(name, SAFETENSORS_DTYPES[one.dtype], tuple(one.shape)) for name, one in tensors.items()]
        with ShardWriter(path, infos, {"format": "pt"}) as shard:
            for name, one in tensors.items():
                shard.write(name, 0, _bytes(one.cpu()))
            shard.commit()

    def _wait(self, writing: tuple[int, Future[None]] | None) -> None:
        if writing is not None:
            index, future = writing
            future.result()
            self.context.whole(index + 1, self._block_file(index), self._record_file(index))

    def _finished(self) -> int:
        """How many blocks, from the first one on, an earlier attempt left whole."""
        for index in range(self.count):
            record, output = self._record_file(index), self._block_file(index)
            if not record.exists() or not output.exists():
                return index
            if json.loads(record.read_bytes())["size"] != output.stat().st_size:
                return index
        return self.count

    def _conclude(self) -> Pressed:
        weight_map: dict[str, str] = {}
        sizes: dict[str, int] = {}
        for number in range(self.count + 1):
            shard = read_shard(self.target / self._shard_name(number))
            weight_map |= dict.fromkeys((one.name for one in shard.tensors), shard.path.name)
            sizes |= {one.name: one.info.size for one in shard.tensors}
        write_index(self.target, weight_map, sum(sizes.values()))
        effects: dict[str, Effect] = {}
        unseen: list[str] = []
        for index in range(self.count):
            record = json.loads(self._record_file(index).read_bytes())
            effects |= {name: Effect(**one) for name, one in record["effects"].items()}
            unseen += record["unseen"]
        self.context.progress(1.0, "done")
        return Pressed(
            effects=effects,
            bytes_after={
                name: sum(size for other, size in sizes.items() if other == name or other.startswith(name + "_"))
                for name in effects
            },
            unseen=tuple(unseen),
            kept=tuple(
                name
                for name in self.source.names()
                if name not in effects and name.endswith(".weight") and len(self.source.stored(name).info.shape) == 2
            ),
        )


class _EnoughSeen(Exception):  # noqa: N818 (nothing went wrong)
    """Every watched layer of a block has been given its inputs."""


class _Watched:
    """The sums of one block's inputs."""

    def __init__(self, method: Method, device: torch.device, count: int) -> None:
        self._method, self._device, self._count = method, device, count
        self._leaders: dict[str, str] = {}
        self._statistics: dict[str, Statistic] = {}
        self._called: set[str] = set()  #: by this batch
        self._seen: list[tuple[Tensor, str]] = []  #: holds this batch's tensors, so that no two share an address

    def next_batch(self, _module: nn.Module, _args: object) -> None:
        self._seen.clear()
        self._called.clear()

    def hook(self, name: str) -> "_Hook":
        return _Hook(self, name)

    def take(self, name: str, inputs: Tensor) -> None:
        if name not in self._leaders:
            self._leaders[name] = next((leader for tensor, leader in self._seen if tensor is inputs), name)
        if self._leaders[name] == name:
            self._seen.append((inputs, name))
            if name not in self._statistics:
                self._statistics[name] = self._method.watch(inputs.shape[-1], self._device)
            self._statistics[name].add(inputs)
        self._called.add(name)
        if len(self._called) == self._count:
            raise _EnoughSeen  # what the last layers make of it is not asked for

    def add_unseen(self, name: str, columns: int) -> None:
        if name not in self._leaders:
            self._leaders[name] = name
            self._statistics[name] = self._method.watch(columns, self._device)

    def inputs(self) -> list[Inputs]:
        return [
            Inputs(tuple(name for name, one in self._leaders.items() if one == leader), statistic)
            for leader, statistic in self._statistics.items()
        ]


@dataclass(frozen=True)
class _Hook:
    watched: _Watched
    name: str

    def __call__(self, _module: nn.Module, args: Sequence[Tensor]) -> None:
        self.watched.take(self.name, args[0])


def _room_for(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, folder: Path) -> Tensor:
    """Memory for the hidden states: on the device, in host memory, or in a file that the kernel pages, whichever has ample room."""
    count = 1
    for dim in shape:
        count *= dim
    size = count * dtype.itemsize
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if size < 0.3 * free:
            return torch.empty(shape, dtype=dtype, device=device)
    if size < 0.25 * psutil.virtual_memory().available:
        return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "hidden-states.bin"
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    room = torch.from_file(str(path), shared=True, size=count, dtype=dtype)
    path.unlink()  # the mapping keeps the file for as long as it is needed
    return room.view(shape)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
