"""Summing up what linear layers are given while samples run through a block."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nightpress.core.compress.model.skeleton import Batch, is_conv1d


class Statistic(Protocol):
    """What a method wants to know of a linear layer's inputs."""

    tokens: int

    def add(self, inputs: Tensor) -> None:
        """Take in [..., columns]."""

    def is_finite(self) -> bool:
        """Whether all that was taken in is finite, and what was made of it."""


@dataclass(frozen=True)
class Inputs:
    """What is known of a tensor that some linear layers are given."""

    names: tuple[str, ...]  #: of their weights
    statistic: Statistic
    #: Weight of an undersampled expert, which was shown all tokens → how many of them are routed to it.
    routed: Mapping[str, int] = field(default_factory=dict)

    def share(self, name: str) -> float:
        """The fraction of the tokens a weight was shown that are routed to it."""
        return self.routed[name] / max(1, self.statistic.tokens) if name in self.routed else 1.0


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
        handles = [layer.register_forward_pre_hook(Hook(self._take, name)) for name, layer in self._linears.items()]
        handles.append(block.register_forward_pre_hook(self._next_run))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def inputs(self) -> list[Inputs]:
        """What was seen; a layer that was given nothing stands by itself."""
        for name, layer in self._linears.items():
            if name not in self._leaders:
                self._leaders[name] = name
                self._statistics[name] = self._watch(in_features(layer), self._device)
        return [
            Inputs(tuple(name for name, first in self._leaders.items() if first == leader), statistic)
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
class Hook:
    """Calls `take` with a name and what a module is given."""

    take: Callable[[str, Tensor], None]
    name: str

    def __call__(self, _module: nn.Module, args: Sequence[Tensor]) -> None:
        self.take(self.name, args[0])


@contextmanager
def hooked(hooks: Mapping[str, Hook], modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """While it lasts, each hook sees what its module is given."""
    handles = [modules[name].register_forward_pre_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def in_features(module: Any) -> int:
    """How many inputs a linear layer takes."""
    return int(module.weight.shape[0] if is_conv1d(module) else module.weight.shape[1])


def split_mask(samples: Batch) -> tuple[Batch, Tensor | None]:
    """The samples without a mask that hides nothing, and the mask as bool [samples, length] where it hides padding."""
    mask = samples.get("attention_mask")
    if mask is None:
        return samples, None
    if bool(mask.all()):
        return {name: tensor for name, tensor in samples.items() if not name.endswith("attention_mask")}, None
    return samples, mask.bool()


def without_padding(inputs: Tensor, real: Tensor | None) -> Tensor:
    """The rows of inputs [B, L, columns] or [B · L, columns] that stand for real tokens; all of them if the shape tells no tokens."""
    if real is None:
        return inputs
    if inputs.shape[:-1] == real.shape:
        return inputs[real]
    if inputs.shape[:-1] == (real.numel(),):
        return inputs[real.flatten()]
    return inputs
