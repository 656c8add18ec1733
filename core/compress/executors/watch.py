"""Looking at what linear layers are given while texts run through a block."""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from core.compress.executors.skeleton import is_conv1d


class Statistic(Protocol):
    """What a method wants to know of a linear layer's inputs."""

    tokens: int

    def add(self, inputs: Tensor) -> None:
        """Take in [..., columns]."""


@dataclass(frozen=True)
class Inputs:
    """What is known of a tensor that some linear layers are given."""

    names: tuple[str, ...]  #: of their weights
    statistic: Statistic


class EnoughSeen(Exception):  # noqa: N818 (nothing went wrong)
    """Every watched layer of a block has been given its inputs."""


class Watched:
    """The sums of one block's inputs. Layers that are given the very same tensor share a sum."""

    def __init__(
        self, watch: Callable[[int, torch.device], Statistic], device: torch.device, linears: Mapping[str, nn.Module]
    ) -> None:
        self._watch, self._device, self._linears = watch, device, linears
        self._leaders: dict[str, str] = {}
        self._statistics: dict[str, Statistic] = {}
        self._called: set[str] = set()  #: by this run
        self._seen: list[tuple[Tensor, str]] = []  #: holds this run's tensors, so that no two share an address
        self.stops = True  #: a run is ended when every layer was called
        self.real: Tensor | None = None  #: bool [B, L] of the batch that runs: False where it is padding; None: nowhere

    @contextmanager
    def over(self, block: nn.Module) -> Iterator[None]:
        """While it lasts, the block's runs are watched."""
        handles = [one.register_forward_pre_hook(_Hook(self._take, name)) for name, one in self._linears.items()]
        handles.append(block.register_forward_pre_hook(self._next_run))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def inputs(self) -> list[Inputs]:
        """What was seen; a layer that was given nothing stands by itself."""
        for name, one in self._linears.items():
            if name not in self._leaders:
                self._leaders[name] = name
                self._statistics[name] = self._watch(in_features(one), self._device)
        return [
            Inputs(tuple(name for name, one in self._leaders.items() if one == leader), statistic)
            for leader, statistic in self._statistics.items()
        ]

    def _next_run(self, _module: nn.Module, _args: object) -> None:
        self._seen.clear()
        self._called.clear()

    def _take(self, name: str, inputs: Tensor) -> None:
        if name not in self._leaders:
            self._leaders[name] = next((leader for tensor, leader in self._seen if tensor is inputs), name)
        if self._leaders[name] == name:
            self._seen.append((inputs, name))
            if name not in self._statistics:
                self._statistics[name] = self._watch(inputs.shape[-1], self._device)
            self._statistics[name].add(without_padding(inputs, self.real))
        self._called.add(name)
        if self.stops and len(self._called) == len(self._linears):
            raise EnoughSeen  # what the last layers make of it is not asked for


@dataclass(frozen=True)
class _Hook:
    take: Callable[[str, Tensor], None]
    name: str

    def __call__(self, _module: nn.Module, args: Sequence[Tensor]) -> None:
        self.take(self.name, args[0])


class Groups:
    """Which linear layers of a block share their inputs, and in which order the groups are called. Learnt from one run of one batch."""

    def __init__(self, linears: Mapping[str, nn.Module]) -> None:
        self._linears = linears
        self._seen: list[tuple[Tensor, list[str]]] = []
        self._calls = 0

    @contextmanager
    def over(self) -> Iterator[None]:
        """While it lasts, calls are noted."""
        handles = [one.register_forward_pre_hook(_Hook(self._take, name)) for name, one in self._linears.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def in_order(self) -> list[list[str]] | None:
        """None if a layer is not called, or called twice: then they can't be settled in turn."""
        if self._calls != len(self._linears) or sum(len(names) for _, names in self._seen) != self._calls:
            return None
        return [names for _, names in self._seen]

    def _take(self, name: str, inputs: Tensor) -> None:
        self._calls += 1
        group = next((names for tensor, names in self._seen if tensor is inputs), None)
        if group is None:
            self._seen.append((inputs, [name]))
        elif name not in group:
            group.append(name)


class InTurn:
    """Runs that stop at each group of layers until all have shown their inputs and the group is settled: one forward pass settles a block.

    Each run is a greenlet, so that its frames keep what it has computed. Within a block every layer sees inputs that the layers before
    it, settled already, have made: what Frantar et al. call true sequential (GPTQ, arXiv 2210.17323, section 4).
    """

    def __init__(self, groups: Sequence[Sequence[str]], linears: Mapping[str, nn.Module]) -> None:
        self._linears = linears
        self._group_of = {name: at for at, names in enumerate(groups) for name in names}
        self._count = len(groups)

    def run(
        self,
        runs: Sequence[Callable[[], None]],
        watch: Callable[[Tensor, int], None],
        settle: Callable[[int], None],
        *,
        to_the_end: bool,
    ) -> None:
        """Run all. `watch` is told each run's inputs of a group, and the run's number; `settle` is called for each group in turn.

        to_the_end: go on behind the last group, too; what comes out is asked for.
        """
        from greenlet import getcurrent, greenlet

        hub = getcurrent()
        shown: dict[tuple[int, int], weakref.ref[Tensor]] = {}

        def stop(name: str, inputs: Tensor) -> None:
            run, group = numbers[getcurrent()], self._group_of[name]
            if (run, group) not in shown:
                shown[run, group] = weakref.ref(inputs)
                watch(inputs, run)
                hub.switch(group)
            elif shown[run, group]() is not inputs:
                raise RuntimeError(f"{name} is not given what its neighbours are given")

        waiting = [greenlet(one) for one in runs]
        numbers: dict[Any, int] = {one: at for at, one in enumerate(waiting)}
        handles = [one.register_forward_pre_hook(_Hook(stop, name)) for name, one in self._linears.items()]
        try:
            for group in range(self._count):
                for one in waiting:
                    if one.switch() != group:
                        raise RuntimeError("A block's layers are not called in the same order for every batch")
                settle(group)
            while waiting and to_the_end:
                waiting.pop(0).switch()  # what it held is free when it ends
        finally:
            for handle in handles:
                handle.remove()


def in_features(module: Any) -> int:
    """How many inputs a linear layer takes."""
    return int(module.weight.shape[0] if is_conv1d(module) else module.weight.shape[1])


def without_padding(inputs: Tensor, real: Tensor | None) -> Tensor:
    """The rows of inputs [B, L, columns] or [B · L, columns] that stand for real tokens; all of them if the shape tells no tokens."""
    if real is None:
        return inputs
    if inputs.shape[:-1] == real.shape:
        return inputs[real]
    if inputs.shape[:-1] == (real.numel(),):
        return inputs[real.flatten()]
    return inputs
