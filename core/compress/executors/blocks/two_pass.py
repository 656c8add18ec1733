"""Settles a block in two passes. The first pass collects statistics of the layers' inputs. Then all layers are settled.

The second pass runs the samples through the settled block. A mixture's layers are settled part by part, so that not all statistics and all
settled weights exist at the same time.
"""

import contextlib
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from nightpress.core.compress.executors.blocks.forward import ForwardPass
from nightpress.core.compress.executors.blocks.plan import BlockPlan
from nightpress.core.compress.executors.blocks.settle import BlockOutcome, Settler
from nightpress.core.compress.executors.watch import EnoughSeen, Inputs, Watched


def press_in_two_passes(
    settler: Settler, index: int, tensors: dict[str, Tensor], linears: Mapping[str, nn.Module]
) -> BlockOutcome:
    """Settle a block whose weights are loaded. tensors: all tensors of the block; linears: the layers to settle.

    If the block is settled in parts, the settled weights are taken out of `tensors`. The samples run through the settled block only if another block follows.
    """
    plan, forward = settler.plan, settler.forward
    seen = _watch(settler, index, linears)
    few = _undersampled(plan, index, seen)
    seen = [inputs for inputs in seen if few.keys().isdisjoint(inputs.names)]
    of_all = {name: tokens for found in plan.group.collect(few) for name, tokens in found.items()}
    seen += _watch_on_all_tokens(settler, index, linears, few, of_all)
    if settler.in_parts(index):
        outcome = _settle_in_parts(settler, index, tensors, seen, linears)
    else:
        outcome = settler.settle(index, tensors, seen, linears)
        seen.clear()  # frees the statistics before the samples run again
        weights = {name: settled.weight for name, settled in outcome.settled.items()}
        plan.skeleton.fill_block(index, {**tensors, **weights})
    outcome = replace(settler.join(index, outcome), undersampled=tuple(of_all.items()))
    if index + 1 < plan.blocks:
        forward.advance(index)
    return outcome


def _settle_in_parts(
    settler: Settler, index: int, tensors: dict[str, Tensor], seen: list[Inputs], linears: Mapping[str, nn.Module]
) -> BlockOutcome:
    """Settle the layers part by part. After each part its settled weights are in their layers, and its statistics are freed.

    Empties `seen`, and takes the settled weights out of `tensors`, because nothing reads them again.
    """
    parts = deque(settler.parts(tensors, seen, linears))
    seen.clear()
    outcome = BlockOutcome({})
    while parts:
        outcome |= _settle_part(settler, index, tensors, parts.popleft(), linears)
    return outcome


def _settle_part(
    settler: Settler, index: int, tensors: dict[str, Tensor], part: Sequence[Inputs], linears: Mapping[str, nn.Module]
) -> BlockOutcome:
    weights = {name: tensors.pop(name) for inputs in part for name in inputs.names}
    found = settler.settle(index, weights, part, linears)
    for name, settled in found.settled.items():
        settler.put(linears[name], settled.weight)
    return found.without_weights()


def _watch(settler: Settler, index: int, linears: Mapping[str, nn.Module]) -> list[Inputs]:
    """Collect the statistics of these layers' inputs."""
    plan = settler.plan
    own = [name for name in linears if plan.skeleton.owner(name) is not None]
    watched = Watched(settler.method.watch, plan.device, linears, own)
    with watched.over(plan.skeleton.blocks[index].module):
        _run_until_seen(settler.forward, index, watched)
    if settler.forward.cache is not None:
        settler.forward.cache.combine(plan.group)
    return watched.inputs(plan.group)


def _run_until_seen(forward: ForwardPass, index: int, watched: Watched) -> None:
    """Run all samples through a block until its last watched layer has been called. The hidden states are not changed."""
    for number in forward.rounds(index):
        if number >= len(forward.hidden):
            forward.take_part(index)
            continue
        with contextlib.suppress(EnoughSeen):
            forward.run_batch(index, number, forward.hidden.look_at(number), watched)


def _undersampled(plan: BlockPlan, index: int, seen: Sequence[Inputs]) -> dict[str, int]:
    """Weight → number of tokens of its expert, for experts with fewer tokens than inputs: too few to tell the inputs apart."""
    prefixes = tuple(prefix for prefix, _ in plan.skeleton.experts(index))
    return {
        name: inputs.statistic.tokens
        for inputs in seen
        for name in inputs.names
        if prefixes and name.startswith(prefixes) and inputs.statistic.tokens < plan.source.stored(name).info.shape[1]
    }


def _watch_on_all_tokens(
    settler: Settler, index: int, linears: Mapping[str, nn.Module], few: Mapping[str, int], of_all: Collection[str]
) -> list[Inputs]:
    """The statistics that these experts' layers have if every token runs through the experts.

    few: tokens of this process's layers. of_all: the layers of all processes.
    """
    if not of_all:
        return []
    layers = {name: layer for name, layer in linears.items() if name in few}
    for prefix, mixture in settler.plan.skeleton.experts(index):
        named = [name.removeprefix(prefix) for name in of_all if name.startswith(prefix)]
        mixture.shown_all = frozenset(int(name.split(".")[0]) for name in named)
    try:
        seen = _watch(settler, index, layers)
    finally:
        for mixture in settler.forward.experts_of(index):
            mixture.shown_all = frozenset()
    return [replace(inputs, routed={name: few[name] for name in inputs.names}) for inputs in seen]
