"""Collects statistics of the inputs of linear layers while samples run through a block."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nightpress.core.compress.model.rows import is_conv1d
from nightpress.core.compress.ranks.group import ALONE, Group


class Statistic(Protocol):
    """A method's statistic of a linear layer's inputs, e.g. their Gram matrix."""

    tokens: int  #: that were added

    def add(self, inputs: Tensor) -> None:
        """Add inputs [..., columns]."""

    def combine(self, group: Group) -> None:
        """Add what the other processes have added, so that all hold the same statistic. With a single process, do nothing."""

    def is_finite(self) -> bool:
        """Whether all inputs, and the statistic itself, are finite."""


@dataclass(frozen=True)
class Inputs:
    """The statistic of one input tensor, which one or more linear layers read."""

    names: tuple[str, ...]  #: the weights of these layers
    statistic: Statistic
    #: Weight of an undersampled expert, which was run on all tokens → number of tokens that the router sends to that expert.
    routed: Mapping[str, int] = field(default_factory=dict)

    def share(self, name: str) -> float:
        """The fraction of the statistic's tokens that the router sends to this weight's expert. 1 for all other weights."""
        return self.routed[name] / max(1, self.statistic.tokens) if name in self.routed else 1.0


class EnoughSeen(Exception):  # noqa: N818 (nothing went wrong)
    """Raised when every watched layer of a block has got its inputs: the rest of the run is not needed."""


class Watched:
    """The statistics of the inputs of one block's layers. Layers that read the same tensor object share a statistic."""

    def __init__(
        self,
        watch: Callable[[int, torch.device], Statistic],
        device: torch.device,
        linears: Mapping[str, nn.Module],
        own: Collection[str] = (),
    ) -> None:
        """own: names of the layers that are in this process alone, and get the tokens of all processes."""
        self._watch, self._device, self._linears, self._own = watch, device, linears, frozenset(own)
        self._leaders: dict[str, str] = {}
        self._statistics: dict[str, Statistic] = {}
        self._called: set[str] = set()  #: layers that this run has called
        #: Keeps this run's tensors alive, so that no two have the same address.
        self._seen: list[tuple[Tensor, str]] = []
        self.stops = True  #: end a run when every layer has been called; not if other processes wait for the run's end
        self.real: Tensor | None = None  #: bool [B, L] of the current batch: False for padding; None: no padding

    @contextmanager
    def over(self, block: nn.Module) -> Iterator[None]:
        """In this context, all runs of the block are watched."""
        handles = [
            layer.register_forward_pre_hook(Hook(self._take, name), with_kwargs=True)
            for name, layer in self._linears.items()
        ]
        handles.append(block.register_forward_pre_hook(self._next_run))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def inputs(self, group: Group = ALONE) -> list[Inputs]:
        """The collected statistics of all processes. A layer that was never called gets an empty statistic of its own."""
        if group.size > 1:
            self._agree(group)
        for name, layer in self._linears.items():
            if name not in self._leaders:
                self._leaders[name] = name
                self._statistics[name] = self._watch(in_features(layer), self._device)
        return [
            Inputs(tuple(name for name, first in self._leaders.items() if first == leader), statistic)
            for leader, statistic in self._statistics.items()
        ]

    def _agree(self, group: Group) -> None:
        """Bring the leaders and their order in line with those of the other processes.

        A process whose tokens the router sends to no layer of an expert does not know which of them share their inputs.
        """
        known: dict[str, str] = {}
        for leaders in reversed(group.collect(self._leaders)):
            known |= leaders
        self._leaders = {name: known.get(name, name) for name in self._linears}
        self._statistics = {
            name: self._statistics[name] if name in self._statistics else self._watch(in_features(layer), self._device)
            for name, layer in self._linears.items()
            if self._leaders[name] == name
        }
        for name, statistic in self._statistics.items():
            if name not in self._own:
                statistic.combine(group)

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
            # An expert gets no padding, and as many tokens as the router sends it.
            self._statistics[name].add(inputs if name in self._own else without_padding(inputs, self.real))
        self._called.add(name)
        if self.stops and len(self._called) == len(self._linears):
            raise EnoughSeen  # the last layers' output is not needed


@dataclass(frozen=True)
class Hook:
    """A forward pre-hook that calls `take` with a name and the module's first input."""

    take: Callable[[str, Tensor], None]
    name: str

    def __call__(self, _module: nn.Module, args: Sequence[Tensor], kwargs: Mapping[str, Any]) -> None:
        self.take(self.name, args[0] if args else next(iter(kwargs.values())))


@contextmanager
def hooked(hooks: Mapping[str, Hook], modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """In this context, each hook is called with the inputs of its module."""
    handles = [modules[name].register_forward_pre_hook(hook, with_kwargs=True) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def in_features(module: Any) -> int:
    """The number of inputs of a linear layer."""
    return int(module.weight.shape[0] if is_conv1d(module) else module.weight.shape[1])


def without_padding(inputs: Tensor, real: Tensor | None) -> Tensor:
    """The rows of inputs [B, L, columns] or [B · L, columns] that are no padding. All rows if the shape does not match the mask.

    real: bool [B, L], False for padding; None: no padding.
    """
    if real is None:
        return inputs
    if inputs.shape[:-1] == real.shape:
        return inputs[real]
    if inputs.shape[:-1] == (real.numel(),):
        return inputs[real.flatten()]
    return inputs
