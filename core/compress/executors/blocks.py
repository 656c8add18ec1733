"""The blocks executor: a calibrated model, one block in memory at a time, whatever its size.

What enters the first block is captured once for all calibration texts. Then for each block: its weights are read, the texts run through it
while every linear layer's inputs are summed up, the method settles its weights, the texts run through it again as it now is, and it is
written as a shard of its own. Where a method settles each layer by itself and memory allows it, the two passes are one: the texts stop
before each layer until it is settled. Reading the next block and writing the last one overlap with the arithmetic.

A killed attempt resumes behind the last block that was written: the finished blocks are run from their files, and since a block always
runs as its files say it, what follows is the same to the last byte.
"""

import contextlib
import gc
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nightpress.core.compress.checkpoint import (
    SAFETENSORS_DTYPES,
    ShardWriter,
    read_shard,
    read_shards,
    tensor_info,
    write_file,
    write_index,
)
from nightpress.core.compress.context import PassContext
from nightpress.core.compress.environment import multiplies_bfloat16
from nightpress.core.compress.executors.activations import (
    Calls,
    Waiting,
    give_large_tensors_pages_of_their_own,
    return_freed_memory,
)
from nightpress.core.compress.executors.experts import Experts
from nightpress.core.compress.executors.live_block import PROBE_TOKENS, LiveBlock
from nightpress.core.compress.executors.rewrite import Effect, Rewrite, becomes
from nightpress.core.compress.executors.skeleton import Batch, Call, Skeleton, Source, is_conv1d
from nightpress.core.compress.executors.watch import (
    EnoughSeen,
    Groups,
    Inputs,
    InTurn,
    Statistic,
    Watched,
    find_groups,
    in_features,
    split_mask,
    without_padding,
)
from nightpress.core.compress.numbers import check_finite, naming
from nightpress.core.compress.solvers.grid import Workspace
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.costs import BATCH_TOKENS, IN_TURN_BYTES, in_turn_bytes

__all__ = ["CacheStandIn", "Inputs", "Method", "Pressed", "Settled", "Statistic", "press_blocks"]


@dataclass(frozen=True)
class Settled:
    """A tensor of a block as it will be from now on."""

    weight: Tensor  #: just what a loader makes of `tensors`
    tensors: dict[str, Tensor]  #: what is written, by name, on any device
    effect: Effect | None  #: None if it is no linear weight, but makes up for what was done to one


class Method(Protocol):
    """A calibrated method: what it watches, and what it makes of weights."""

    @property
    def by_group(self) -> bool:
        """Whether the layers behind each tensor are settled by themselves: then `settle` may be called for them as soon as it is known."""

    def watch(self, columns: int, device: torch.device) -> Statistic: ...

    def settle(self, block: LiveBlock, inputs: Sequence[Inputs], device: torch.device) -> dict[str, Settled]:
        """What becomes of the tensors of a block, given by name in their stored dtype: of all that were watched, and of others if need be."""

    def restore(self, name: str, written: Mapping[str, Tensor]) -> Tensor:
        """A settled linear weight from what was written."""


class CacheStandIn(Protocol):
    """What blocks are given in place of a key/value cache, to see what they would cache."""

    real: Tensor | None  #: bool [B, L] of the batch that runs: False where it is padding; None: nowhere


@dataclass(frozen=True)
class Pressed:
    """What a run did."""

    effects: dict[str, Effect]  #: by weight
    bytes_after: dict[str, int]  #: by weight, of all that was written for it
    unseen: tuple[str, ...]  #: weights that no calibration token reached
    starved: dict[
        str, int
    ]  #: weights of experts that were calibrated with every token, and how few the router gave them
    kept: tuple[str, ...]  #: matrices that were copied
    warnings: dict[str, int]  #: what a person should know, and of how many blocks it is true


def press_blocks(
    source: Path,
    target: Path,
    method: Method,
    samples: Batch,
    context: PassContext,
    *,
    chosen: frozenset[str],
    recipe: str,
    outside: Mapping[str, Rewrite] | None = None,
    cache: CacheStandIn | None = None,
) -> Pressed:
    """Settle the chosen weights of all blocks and copy the rest of the model's tensors; `target` gets its shards and their index.

    samples are what the model is called with, each [samples, …]: whole calibration texts, or padded ones with their mask, or pixels. `recipe` says what is done, so that only blocks made just so are taken over from
    an earlier attempt. `outside` says what becomes of tensors that are in no block. `cache` is given to the blocks in place of a key/value
    cache while they are watched. If a GPU's memory does not suffice, smaller batches are tried once. Raises NightpressError.
    """
    target.mkdir(parents=True, exist_ok=True)
    give_large_tensors_pages_of_their_own()
    run = partial(_Run, source, target, method, samples, context, chosen, recipe, outside or {}, cache)
    with torch.no_grad():
        try:
            return run(share=1).run()
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
        # No name holds the failed run, and the error with its frames is gone. Reference cycles are left to collect.
        gc.collect()
        torch.cuda.empty_cache()
        context.progress(0.0, "memory ran out: once more with smaller batches")
        try:
            return run(share=4).run()
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            raise _out_of_memory(error) from error


def _is_out_of_memory(error: RuntimeError) -> bool:
    """torch has a class for a GPU's memory, and only a text for the host's."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _out_of_memory(error: RuntimeError) -> NightpressError:
    on_gpu = isinstance(error, torch.OutOfMemoryError)
    return NightpressError(
        ErrorCode.GPU_OUT_OF_MEMORY if on_gpu else ErrorCode.OUT_OF_MEMORY,
        f"The {'GPU' if on_gpu else 'worker'}'s memory does not hold one block of the model with its calibration, even in small batches.",
        hint=f"Use fewer or shorter calibration samples, or a {'GPU' if on_gpu else 'worker'} with more memory.",
    )


class _Run:
    def __init__(
        self,
        source: Path,
        target: Path,
        method: Method,
        samples: Batch,
        context: PassContext,
        chosen: frozenset[str],
        recipe: str,
        outside: Mapping[str, Rewrite],
        cache: CacheStandIn | None,
        share: int,
    ) -> None:
        self.outside, self.cache = outside, cache
        self.target, self.method, self.context, self.chosen = target, method, context, chosen
        self.source = Source(read_shards(source))
        self.device = torch.device(context.device)
        self.skeleton = Skeleton(source, self.source, context.device, self._compute_dtype())
        self.samples, self.real = split_mask(samples)
        self.total = len(next(iter(samples.values())))
        self.length = _tokens_a_sample(samples, self.skeleton.config)
        self.batch = max(1, min(self.total, BATCH_TOKENS[self.device.type] // share // self.length))
        self.count = len(self.skeleton.blocks)
        digest = hashlib.sha256(f"{recipe}\n{self.batch}\n{self.skeleton.dtype}\n{target.name}".encode())
        for name, one in sorted(samples.items()):
            digest.update(name.encode() + one.contiguous().numpy().tobytes())
        for shard in self.source.shards:
            digest.update(shard.header)
        self.records = context.work_dir / "blocks" / digest.hexdigest()[:16]
        self.records.mkdir(parents=True, exist_ok=True)
        self.came_out: list[Waiting] = []  #: of each row that has run, the texts' hidden states
        self.calls = Calls(self.device)
        self.effects: dict[str, Effect] = {}  #: of tensors outside the blocks
        self.unseen: list[str] = []
        self.starved: dict[str, int] = {}
        self.groups: dict[tuple[str, ...], Groups | None] = {}
        self.probe: tuple[int, list[tuple[int, Call]]] | None = None  #: length of a text, and the blocks' calls for it
        self.warnings: list[str] = []  #: of the block that was settled last

    def run(self) -> Pressed:
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
            rest: Future[None] = writer.submit(self._copy_rest)
            self.context.progress(0.0, "calibrating")
            finished = self._finished()
            coming = reader.submit(self._read_ahead, 0, finished)
            writing: tuple[int, Future[None]] | None = None
            for index, block in enumerate(self.skeleton.blocks):
                if index == 0 or block.row != self.skeleton.blocks[index - 1].row:
                    self._capture(block.row)
                tensors = coming.result() or self._read(index, finished)
                if index + 1 < self.count:
                    coming = reader.submit(self._read_ahead, index + 1, finished)
                self.context.progress(index / self.count, f"block {index + 1} of {self.count}")
                if index < finished:
                    tensors |= {name: self.method.restore(name, tensors) for name in self._chosen_of(index)}
                    self.skeleton.fill_block(index, tensors)
                    self._forward(index)
                else:
                    settled = self._press(index, tensors)
                    self._wait(writing)
                    record = self._record(settled)
                    writing = index, writer.submit(self._write, index, _as_written(tensors, settled), record)
                    del settled
                del tensors
                self.skeleton.empty_block(index)
                return_freed_memory()
            self._wait(writing)
            rest.result()
        return self._conclude()

    def _compute_dtype(self) -> torch.dtype:
        """As `Calibration.dtype` says."""
        if self.context.calibration.dtype == "float32":
            return torch.float32
        if self.device.type == "cpu":
            return torch.bfloat16 if multiplies_bfloat16() else torch.float32
        names = {self.source.stored(name).info.dtype for name in self.chosen or self.source.names()}
        return next(
            (dtype for dtype in (torch.float32, torch.bfloat16) if SAFETENSORS_DTYPES[dtype] in names), torch.float16
        )

    # Texts -------------------------------------------------------------------------------------------------------------

    def _capture(self, row: int) -> None:
        """What enters a row [samples, length, width], and what each of its blocks is given beside it."""
        starts = range(0, self.total, self.batch)
        batches = ({name: one[at : at + self.batch] for name, one in self.samples.items()} for at in starts)
        earlier = [list(one) for one in self.came_out]
        hidden: Waiting | None = None
        self.calls = Calls(self.device)
        self.probe = None
        captured = self.skeleton.capture(row, batches if row else chain([_first_text(self.samples)], batches), earlier)
        if not row:
            entered, heard = next(captured)
            self.probe = entered.shape[1], heard
        for number, (entered, heard) in enumerate(captured):
            if hidden is None:
                shape = (self.total, *entered.shape[1:])
                hidden = Waiting(shape, self.batch, entered.dtype, self.device, self.context.work_dir)
            hidden.put(number, entered.clone())
            self.calls.add(heard, keep_on=hidden.device)
        assert hidden is not None
        self.came_out.append(hidden)

    def _through(self, index: int, number: int, batch: Tensor, watched: Watched | None = None) -> Tensor:
        """A batch [B, L, width] after all runs of a block."""
        block, calls = self.skeleton.blocks[index].module, self.calls.of(index, number)
        for mixture in self._experts_of(index):
            real = self._real(number)
            mixture.real = None if real is None else real.flatten()
        for at, call in enumerate(calls, 1):
            beside: dict[str, object] = {}
            if watched is not None:
                watched.stops, watched.real = at == len(calls), self._real(number)
                if self.cache is not None:
                    self.cache.real, beside = watched.real, {"past_key_values": self.cache}
            out = block(batch, *call.args, **{**call.kwargs, **beside})
            batch = out[0] if isinstance(out, tuple) else out
        return batch

    def _forward(self, index: int) -> None:
        """Run all texts through a block; what comes out takes the place of what went in."""
        hidden = self.came_out[-1]
        for number in range(len(hidden)):
            hidden.put(number, self._through(index, number, hidden.take(number)))

    def _real(self, number: int) -> Tensor | None:
        """Which of a batch's tokens are no padding, bool [B, L]; None if all."""
        if self.real is None:
            return None
        return self.real[number * self.batch : (number + 1) * self.batch].to(self.device)

    def _chosen_of(self, index: int) -> dict[str, nn.Module]:
        """The chosen weights of a block by name, with their layers."""
        return {name: one for name, one in self.skeleton.linears(index).items() if name in self.chosen}

    def _experts_of(self, index: int) -> list[Experts]:
        return [one for _, one in self.skeleton.experts(index)]

    # A block -----------------------------------------------------------------------------------------------------------

    def _press(self, index: int, tensors: dict[str, Tensor]) -> dict[str, Settled]:
        self.skeleton.fill_block(index, tensors)
        linears = self._chosen_of(index)
        groups = self._groups_of(index, linears)
        if groups is not None:
            return self._press_in_turn(index, tensors, linears, groups)
        inputs = self._watch(index, linears) + self._watch_starved(index, linears)
        settled = self._settle(index, tensors, inputs, linears)
        del inputs
        self.skeleton.fill_block(index, tensors | {name: one.weight for name, one in settled.items()})
        if index + 1 < self.count:
            self._forward(index)
        return settled

    def _settle(
        self, index: int, tensors: Mapping[str, Tensor], inputs: Sequence[Inputs], linears: Mapping[str, nn.Module]
    ) -> dict[str, Settled]:
        """The method's answer. It knows weights as [out, in] alone; those stored the other way round are turned before and after."""
        layers = [[name.removesuffix(".weight") for name in one.names] for one in inputs]
        for names, one in zip(layers, inputs, strict=True):
            check_finite(names, one.statistic)
        self.unseen += [name for one in inputs if one.statistic.tokens == 0 for name in one.names]
        turned = {name for name, one in linears.items() if is_conv1d(one)}
        given = {name: one.t().contiguous() if name in turned else one for name, one in tensors.items()}
        live = self._live(index, given, turned)
        with naming([name for names in layers for name in names]):
            settled = self.method.settle(live, inputs, self.device)
        self.warnings = live.warnings
        return {name: _turned(name, one) if name in turned else one for name, one in settled.items()}

    def _live(self, index: int, given: Mapping[str, Tensor], turned: set[str]) -> LiveBlock:
        """The block for a method; one that settles more than what stands behind one tensor may try it."""
        block = self.skeleton.blocks[index]
        if self.probe is None or self.method.by_group:
            return LiveBlock(given, block)
        length, heard = self.probe
        for mixture in self._experts_of(index):
            mixture.real = None if self.real is None else self.real[0, :length].to(self.device)
        entered = self.came_out[-1].look_at(0)[:1, :length]
        return LiveBlock(given, block, entered, [call for at, call in heard if at == index], turned)

    # In two passes: watch, settle, run again

    def _watch(self, index: int, linears: Mapping[str, nn.Module]) -> list[Inputs]:
        """Sum up the inputs of every linear layer."""
        watched = Watched(self.method.watch, self.device, linears)
        with watched.over(self.skeleton.blocks[index].module):
            self._show(index, watched)
        few = self._starved(index, watched.inputs())
        self.starved |= few
        return [one for one in watched.inputs() if few.keys().isdisjoint(one.names)]

    def _show(self, index: int, watched: Watched) -> None:
        """Run all texts through a block as far as there is something to see; they stay as they are."""
        for number in range(len(self.came_out[-1])):
            with contextlib.suppress(EnoughSeen):
                self._through(index, number, self.came_out[-1].look_at(number), watched)

    def _starved(self, index: int, inputs: Sequence[Inputs]) -> dict[str, int]:
        """The weights of experts that saw fewer tokens than they have inputs, too few to tell one input from another."""
        prefixes = tuple(prefix for prefix, _ in self.skeleton.experts(index))
        return {
            name: one.statistic.tokens
            for one in inputs
            for name in one.names
            if prefixes and name.startswith(prefixes) and one.statistic.tokens < self.source.stored(name).info.shape[1]
        }

    def _watch_starved(self, index: int, linears: Mapping[str, nn.Module]) -> list[Inputs]:
        """The inputs of starved experts if every token went through them."""
        starved = {name: one for name, one in linears.items() if name in self.starved}
        if not starved:
            return []
        for prefix, mixture in self.skeleton.experts(index):
            named = [name.removeprefix(prefix) for name in starved if name.startswith(prefix)]
            mixture.shown_all = frozenset(int(name.split(".")[0]) for name in named)
        watched = Watched(self.method.watch, self.device, starved)
        try:
            with watched.over(self.skeleton.blocks[index].module):
                self._show(index, watched)
        finally:
            for mixture in self._experts_of(index):
                mixture.shown_all = frozenset()
        return [replace(one, routed={name: self.starved[name] for name in one.names}) for one in watched.inputs()]

    # In one pass: the texts wait before each group of layers until it is settled

    def _groups_of(self, index: int, linears: Mapping[str, nn.Module]) -> Groups | None:
        """The layers in groups of the same inputs, in the order of their calls; None if they can't be settled in turn."""
        if not self.method.by_group or not linears or self.skeleton.experts(index) or self.calls.runs(index) > 1:
            return None
        samples, length, width = self.came_out[-1].shape
        widest = max(in_features(one) for one in linears.values())
        held = in_turn_bytes(samples * length, width, widest, self.skeleton.dtype.itemsize)
        if held > IN_TURN_BYTES[self.device.type]:
            return None
        short = self.skeleton.short_names(index)
        like = tuple(short[name] for name in linears)
        if like not in self.groups:
            layers = {short[name]: one for name, one in linears.items()}
            batch = self.came_out[-1].look_at(0)
            self.groups[like] = find_groups(
                self.skeleton.blocks[index].module, layers, lambda: self._through(index, 0, batch.clone())
            )
        return self.groups[like]

    def _press_in_turn(
        self, index: int, tensors: dict[str, Tensor], linears: Mapping[str, nn.Module], groups: Groups
    ) -> dict[str, Settled]:
        settled: dict[str, Settled] = {}
        statistic: Statistic | None = None
        block, hidden = self.skeleton.blocks[index], self.came_out[-1]

        def watch(inputs: Tensor, number: int) -> None:
            nonlocal statistic
            if statistic is None:
                statistic = self.method.watch(inputs.shape[-1], self.device)
            statistic.add(without_padding(inputs, self._real(number)))

        def settle(layers: Sequence[str]) -> None:
            nonlocal statistic
            assert statistic is not None
            names = tuple(block.names[layer] for layer in layers)
            found = self._settle(index, {name: tensors[name] for name in names}, [Inputs(names, statistic)], linears)
            statistic = None
            for name, one in found.items():
                weight = one.weight.to(self.device, self.skeleton.dtype)
                linears[name].weight = nn.Parameter(weight, requires_grad=False)
                tensors[name] = one.weight  # what it was is not asked for again
            settled.update(found)
            return_freed_memory()

        def through(number: int) -> None:
            hidden.put(number, self._through(index, number, hidden.take(number)))

        layers = {layer: linears[name] for layer, name in block.names.items() if name in linears}
        runs = [partial(through, number) for number in range(len(hidden))]
        InTurn(groups, block.module, layers).run(runs, watch, settle, to_the_end=index + 1 < self.count)
        return settled

    # Files -------------------------------------------------------------------------------------------------------------

    def _shard_name(self, number: int) -> str:
        return f"model-{number + 1:05}-of-{self.count + 1:05}.safetensors"

    def _block_file(self, index: int) -> Path:
        return self.target / self._shard_name(index + 1)

    def _record_file(self, index: int) -> Path:
        return self.records / f"block-{index:05}.json"

    def _read_ahead(self, index: int, finished: int) -> dict[str, Tensor]:
        """A block's tensors, for a GPU; a CPU takes far longer to compute than to read, so there the kernel alone reads ahead."""
        if self.device.type == "cuda":
            return self._read(index, finished)
        if index >= finished:
            self.source.will_need(self.skeleton.block_names(index))
        return {}

    def _read(self, index: int, finished: int) -> dict[str, Tensor]:
        """A block's tensors: as they were, or, of a finished one, as they were written."""
        if index < finished:
            written = Source((read_shard(self._block_file(index)),))
            return {name: written.read(name) for name in written.names()}
        tensors = {name: self.source.read(name) for name in self.skeleton.block_names(index)}
        return {name: one.pin_memory() for name, one in tensors.items()} if self.device.type == "cuda" else tensors

    def _record(self, settled: Mapping[str, Settled]) -> dict[str, Any]:
        """What was done to a block. Its writer is given values: the next block changes what this is read from."""
        return {
            "effects": {name: asdict(one.effect) for name, one in settled.items() if one.effect is not None},
            "unseen": [name for name in self.unseen if name in settled],
            "starved": {name: count for name, count in self.starved.items() if name in settled},
            "warnings": list(self.warnings),
        }

    def _write(self, index: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        self._write_shard(self._block_file(index), tensors)
        size = self._block_file(index).stat().st_size
        write_file(self._record_file(index), json.dumps({"size": size, **record}).encode())

    def _copy_rest(self) -> None:
        """The shard of all tensors outside the blocks. Made anew by every attempt: it takes a moment."""
        inside = {name for index in range(self.count) for name in self.skeleton.block_names(index)}
        names = [name for name in self.source.names() if name not in inside]
        infos = [out for name in names for out in becomes(self.source.stored(name).info, self.outside.get(name))]
        with ShardWriter(self.target / self._shard_name(0), infos, {"format": "pt"}) as shard:

            def put(part: str, at: int, tensor: Tensor) -> None:
                shard.write(part, at, _bytes(tensor))

            for name in names:
                if name in self.outside:
                    self.effects[name] = self.outside[name](self.source.read(name), 0, put, Workspace())
                    continue
                for at, piece in self.source.pieces(name):
                    shard.write(name, at, piece)
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
        write_index(self.target)
        sizes = {one.name: one.info.size for shard in read_shards(self.target) for one in shard.tensors}
        effects = dict(self.effects)
        unseen: list[str] = []
        starved: dict[str, int] = {}
        warnings: Counter[str] = Counter()
        for index in range(self.count):
            record = json.loads(self._record_file(index).read_bytes())
            effects |= {name: Effect(**one) for name, one in record["effects"].items()}
            unseen += record["unseen"]
            starved |= record["starved"]
            warnings.update(record["warnings"])
        self.context.progress(1.0, "done")
        return Pressed(
            effects=effects,
            bytes_after={
                name: sum(size for other, size in sizes.items() if other == name or other.startswith(name + "_"))
                for name in effects
            },
            unseen=tuple(unseen),
            starved=starved,
            kept=tuple(
                name
                for name in self.source.names()
                if name not in effects and name.endswith(".weight") and len(self.source.stored(name).info.shape) == 2
            ),
            warnings=dict(warnings),
        )


def _as_written(tensors: Mapping[str, Tensor], settled: Mapping[str, Settled]) -> dict[str, Tensor]:
    """A block's tensors as they go into its file; the floats they stand for are not held on to."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        out |= settled[name].tensors if name in settled else {name: tensor}
    return out


def _turned(name: str, one: Settled) -> Settled:
    """A settled weight in the layout [in, out]."""
    assert one.tensors.keys() == {name}, "codes can't be turned"
    weight = one.weight.t().contiguous()
    return Settled(weight=weight, tensors={name: weight}, effect=one.effect)


def _first_text(samples: Batch) -> Batch:
    """The beginning of the first text, or the first image."""
    return {name: one[:1] if one.dim() > 2 else one[:1, :PROBE_TOKENS] for name, one in samples.items()}


def _tokens_a_sample(samples: Batch, config: Any) -> int:
    if "input_ids" in samples:
        return int(samples["input_ids"].shape[1])
    height, width = samples["pixel_values"].shape[-2:]
    return int(height // config.patch_size * (width // config.patch_size)) + 1


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
