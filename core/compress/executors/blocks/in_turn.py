"""Settles a block in a single pass: all samples stop before each group of layers until the group is settled.

So every layer is calibrated with inputs from the settled layers before it in the same block. Frantar et al. call this true sequential
(GPTQ, arXiv 2210.17323, section 4).
"""

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from nightpress.core.compress.executors.blocks.groups import ENTERED, Groups, find_groups, let_go
from nightpress.core.compress.executors.blocks.settle import BlockOutcome, Settler
from nightpress.core.compress.executors.watch import (
    Hook,
    Inputs,
    Statistic,
    hooked,
    in_features,
    without_padding,
)
from nightpress.core.compress.memory import return_freed_memory
from nightpress.core.recipes.costs import IN_TURN_BYTES, in_turn_bytes


class GroupFinder:
    """Finds the groups of layers of each block. Blocks with the same parameters have the same groups, which are found once."""

    def __init__(self, settler: Settler) -> None:
        self._settler = settler
        self._found: dict[tuple[str, ...], Groups | None] = {}

    def groups_of(self, index: int, linears: Mapping[str, nn.Module]) -> Groups | None:
        """The layers in groups that share their inputs, in the order of their calls. None if the block can't be settled in turn.

        A block can't if the method needs all layers at once, if it has experts or runs more than once, or if the memory of a single process
        would not suffice: several processes come to the same result.
        """
        plan, forward = self._settler.plan, self._settler.forward
        if not self._settler.method.by_group or not linears or plan.skeleton.whole is not None:
            return None
        if plan.skeleton.experts(index) or forward.runs(index) > 1:
            return None
        _, length, *widths = forward.hidden.shape
        widest = max(in_features(layer) for layer in linears.values())
        held = in_turn_bytes(plan.total * length, math.prod(widths), widest, plan.skeleton.dtype.itemsize)
        if held > IN_TURN_BYTES[plan.device.type]:
            return None
        short = plan.skeleton.short_names(index)
        like = (*plan.skeleton.blocks[index].names, *(short[name] for name in linears))
        if like not in self._found:
            layers = {short[name]: layer for name, layer in linears.items()}
            batch = forward.hidden.look_at(0)
            self._found[like] = find_groups(
                plan.skeleton.blocks[index].module, layers, lambda: forward.run_batch(index, 0, batch.clone())
            )
        return self._found[like]


def press_in_turn(
    settler: Settler, index: int, tensors: dict[str, Tensor], linears: Mapping[str, nn.Module], groups: Groups
) -> BlockOutcome:
    """Settle a block group by group. Its weights are loaded; the settled weights replace the old ones in `tensors`.

    The samples run past the last group only if another block follows.
    """
    plan, forward = settler.plan, settler.forward
    outcome = BlockOutcome({})
    statistic: Statistic | None = None
    block = plan.skeleton.blocks[index]

    def watch(inputs: Tensor, number: int) -> None:
        nonlocal statistic
        if statistic is None:
            statistic = settler.method.watch(inputs.shape[-1], plan.device)
        statistic.add(without_padding(inputs, forward.real(number)))

    def settle(layers: Sequence[str]) -> None:
        nonlocal statistic, outcome
        assert statistic is not None
        if plan.group.size > 1:
            statistic.combine(plan.group)
        names = tuple(block.names[layer] for layer in layers)
        found = settler.settle(index, {name: tensors[name] for name in names}, [Inputs(names, statistic)], linears)
        statistic = None
        for name, settled in found.settled.items():
            settler.put(linears[name], settled.weight)
            tensors[name] = settled.weight  # frees the old weight: nothing reads it again
        outcome |= found
        return_freed_memory()

    layers = {layer: linears[name] for layer, name in block.names.items() if name in linears}
    runs = [partial(forward.advance_batch, index, number) for number in range(len(forward.hidden))]
    InTurn(groups, block.module, layers).run(runs, watch, settle, to_the_end=index + 1 < plan.blocks)
    return outcome


class InTurn:
    """Runs of a block that stop at each group of layers. When all runs have passed on their inputs, the group is settled.

    Each run is a greenlet. While it waits, its frames keep its intermediate tensors, except those that `Groups.spent` allows to free.
    """

    def __init__(self, groups: Groups, block: nn.Module, linears: Mapping[str, nn.Module]) -> None:
        self._groups, self._modules = groups, {**linears, "": block}
        self._group_of = {name: at for at, names in enumerate(groups.layers) for name in names}

    def run(
        self,
        runs: Sequence[Callable[[], None]],
        watch: Callable[[Tensor, int], None],
        settle: Callable[[Sequence[str]], None],
        *,
        to_the_end: bool,
    ) -> None:
        """Run all. Calls `watch` with a group's inputs in each run and the run's number, then `settle` for the group.

        to_the_end: finish the runs after the last group, because their outputs are needed.
        """
        from greenlet import getcurrent, greenlet

        hub = getcurrent()
        shown: dict[tuple[int, int], weakref.ref[Tensor]] = {}

        def enter(_name: str, inputs: Tensor) -> None:
            shown[numbers[getcurrent()], ENTERED] = weakref.ref(inputs)

        def stop(name: str, inputs: Tensor) -> None:
            run, group = numbers[getcurrent()], self._group_of[name]
            if (run, group) not in shown:
                shown[run, group] = weakref.ref(inputs)
                for spent in self._groups.spent[group]:
                    if (tensor := shown[run, spent]()) is not None:
                        let_go(tensor)
                watch(inputs, run)
                hub.switch(group)
            elif shown[run, group]() is not inputs:
                raise RuntimeError(f"{name} is not given what the other layers of its group are given")

        waiting = [greenlet(run) for run in runs]
        numbers: dict[Any, int] = {run: at for at, run in enumerate(waiting)}
        hooks = {name: Hook(stop, name) for name in self._group_of} | {"": Hook(enter, "")}
        try:
            with hooked(hooks, self._modules):
                for group, names in enumerate(self._groups.layers):
                    for run in waiting:
                        if run.switch() != group:
                            raise RuntimeError("A block's layers are not called in the same order for every batch")
                    settle(names)
                while waiting and to_the_end:
                    waiting.pop(0).switch()  # a run frees its tensors when it ends
        finally:
            for run in waiting:
                run.throw()  # the garbage collector does not traverse suspended greenlets: their frames would never be freed
