"""The blocks executor: a loop that settles the blocks of a model one after the other."""

import contextlib
import gc
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from nightpress.core.compress.context import PassContext, over_ranks
from nightpress.core.compress.executors.batches import count_of
from nightpress.core.compress.executors.blocks.forward import ForwardPass
from nightpress.core.compress.executors.blocks.in_turn import GroupFinder, press_in_turn
from nightpress.core.compress.executors.blocks.lessons import RunLessons
from nightpress.core.compress.executors.blocks.method import CacheStandIn, Method, RunResult
from nightpress.core.compress.executors.blocks.plan import BlockPlan, make_plan
from nightpress.core.compress.executors.blocks.resume import RunFiles, conclude, run_files
from nightpress.core.compress.executors.blocks.settle import BlockOutcome, Settler
from nightpress.core.compress.executors.blocks.two_pass import press_in_two_passes
from nightpress.core.compress.executors.blocks.writer import BlockWriter, block_output
from nightpress.core.compress.executors.reproducible import reproducible
from nightpress.core.compress.executors.rewrite import Rewrite
from nightpress.core.compress.memory import map_large_tensors, return_freed_memory
from nightpress.core.compress.model.skeleton import Batch
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.costs import pinned_bytes, reads_ahead


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
    step: int | None = None,
) -> RunResult:
    """Settle the chosen weights of all blocks and copy the model's other tensors. Writes shards and their index to `target`.

    samples: the model's inputs, each [samples, …]: whole calibration texts, or padded texts with their mask, or pixels.
    chosen: names of the weights to settle.
    recipe: identifies what is done. Blocks of an earlier attempt are reused only if they were made with the same recipe.
    outside: rewrites of tensors that are in no block, by name.
    cache: passed to the blocks in place of a key/value cache while they are watched.
    step: samples of a learning step. The method then gets lessons, i.e. `LiveBlock.lessons`. None: it does not learn.

    If memory does not suffice, the run is tried once more with smaller batches. Several processes share out the samples if `context.ranks`
    has some, and there are as many samples. Raises NightpressError.
    """
    count = count_of(samples)
    given = (source, target, method, samples, chosen, recipe, outside or {}, cache, step)
    try:
        return cast("RunResult", over_ranks(_run, *given, 1, samples=count, context=context))
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
    # The failed run's frames were freed with the error. Its reference cycles must still be collected.
    gc.collect()
    torch.cuda.empty_cache()
    context.progress(0.0, "memory ran out: once more with smaller batches")
    try:
        return cast("RunResult", over_ranks(_run, *given, 4, samples=count, context=context))
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        raise _out_of_memory(error) from error


def _run(
    source: Path,
    target: Path,
    method: Method,
    samples: Batch,
    chosen: frozenset[str],
    recipe: str,
    outside: Mapping[str, Rewrite],
    cache: CacheStandIn | None,
    step: int | None,
    share: int,
    *,
    context: PassContext,
) -> RunResult | None:
    """Run in this process. Only the first process of a group writes, and returns a result. share: as in `make_plan`."""
    map_large_tensors()
    gradients = contextlib.nullcontext() if step is None else reproducible(context.device)
    with torch.no_grad(), gradients:
        plan = make_plan(source, target, samples, context, chosen, recipe, share=share, step=step)
        return _press(plan, target, method, outside, cache, step, context)


def _press(
    plan: BlockPlan,
    target: Path,
    method: Method,
    outside: Mapping[str, Rewrite],
    cache: CacheStandIn | None,
    step: int | None,
    context: PassContext,
) -> RunResult | None:
    files = run_files(target, context.work_dir, plan)
    forward = ForwardPass(plan, cache, context.work_dir)
    lessons = None if step is None else RunLessons(plan, forward, step, context)
    settler = Settler(plan, method, forward, lessons)
    finder = GroupFinder(settler)
    skeleton, count = plan.skeleton, plan.blocks
    inside = {name for index in range(count) for name in skeleton.block_names(index)}
    rest = tuple(name for name in plan.source.names() if name not in inside)
    with ThreadPoolExecutor(1) as reader, BlockWriter(files, context) as writer:
        copied = writer.copy_rest(plan.source, rest, outside) if plan.group.first else None
        context.progress(0.0, "calibrating")
        inputs = BlockReader(plan, files, finished=plan.group.collect(files.finished())[0])
        coming = reader.submit(inputs.read_ahead, 0)
        for index, block in enumerate(skeleton.blocks):
            if index == 0 or block.row != skeleton.blocks[index - 1].row:
                forward.enter_row(block.row)
                if lessons is not None:
                    lessons.enter_row(block.row)
            tensors = coming.result() or inputs.read(index)
            if index + 1 < count:
                coming = reader.submit(inputs.read_ahead, index + 1)
            context.progress(index / count, f"block {index + 1} of {count}")
            if lessons is not None:
                lessons.advance_source(index, inputs.of_source(index) if index < inputs.finished else tensors)
            if index < inputs.finished:
                tensors |= {name: settler.placed(method.restore(name, tensors)) for name in plan.chosen_of(index)}
                if index + 1 < count:
                    skeleton.fill_block(index, tensors)
                    forward.advance(index)
            else:
                outcome = _press_block(settler, finder, index, tensors)
                if plan.group.first:
                    writer.write(block_output(plan, index, tensors, outcome))
                del outcome
            del tensors
            skeleton.empty_block(index)
            return_freed_memory()
        writer.wait()
        effects = None if copied is None else copied.result()
    if effects is None:
        return None
    pressed = conclude(files, plan.source, effects)
    context.progress(1.0, "done")
    return pressed


def _press_block(settler: Settler, finder: GroupFinder, index: int, tensors: dict[str, Tensor]) -> BlockOutcome:
    settler.plan.skeleton.fill_block(index, tensors)
    linears = settler.plan.chosen_of(index)
    groups = finder.groups_of(index, linears)
    if groups is None:
        return press_in_two_passes(settler, index, tensors, linears)
    return press_in_turn(settler, index, tensors, linears, groups)


@dataclass(frozen=True)
class BlockReader:
    """Reads the tensors of a block: from the source, or from the output if the block is finished. Any thread may call it."""

    plan: BlockPlan
    files: RunFiles
    finished: int  #: number of blocks that an earlier attempt finished

    def read(self, index: int) -> dict[str, Tensor]:
        return (
            self.files.read_block(index, self.plan.skeleton.holds) if index < self.finished else self.of_source(index)
        )

    def of_source(self, index: int) -> dict[str, Tensor]:
        """The tensors of a block in the source that this process holds. For a GPU they are in pinned memory, copied one after the other."""
        pinned = self.plan.device.type == "cuda"
        read = self.plan.source.read
        return {
            name: read(name).pin_memory() if pinned else read(name) for name in self.plan.skeleton.held_names(index)
        }

    @cached_property
    def holds_next(self) -> bool:
        """Whether the next block is held in memory while a block runs.

        A CPU computes a block far longer than it reads one, so holding a second block would not help. For a GPU, blocks must be small enough.
        """
        if self.plan.device.type != "cuda":
            return False
        stored = self.plan.source.stored
        blocks = [
            [stored(name).info.size for name in self.plan.skeleton.held_names(index)]
            for index in range(self.plan.blocks)
        ]
        return reads_ahead(pinned_bytes(blocks))

    def read_ahead(self, index: int) -> dict[str, Tensor]:
        """Read a block's tensors in advance if they may be held in memory. Else only ask the kernel to read ahead, and return {}."""
        if self.holds_next:
            return self.read(index)
        if index >= self.finished:
            self.plan.source.will_need(self.plan.skeleton.held_names(index))
        return {}


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out. torch has an error class for a GPU's memory, but only an error text for the host's."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _out_of_memory(error: RuntimeError) -> NightpressError:
    on_gpu = isinstance(error, torch.OutOfMemoryError)
    return NightpressError(
        ErrorCode.GPU_OUT_OF_MEMORY if on_gpu else ErrorCode.OUT_OF_MEMORY,
        f"The {'GPU' if on_gpu else 'worker'}'s memory does not hold one block of the model with its calibration, even in small batches.",
        hint=f"Use fewer or shorter calibration samples, or a {'GPU' if on_gpu else 'worker'} with more memory.",
    )
