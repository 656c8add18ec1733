"""Looking at what linear layers are given while texts run through a block."""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nightpress.core.compress.executors.skeleton import Batch, is_conv1d


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
    #: Of weights that were shown more tokens than come to them, how many do: starved experts'.
    routed: Mapping[str, int] = field(default_factory=dict)

    def share(self, name: str) -> float:
        """How many of the tokens that a weight was shown come to it, of 1."""
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


@dataclass(frozen=True)
class Groups:
    """Layers of a block that share their inputs, in the order of their calls."""

    layers: tuple[tuple[str, ...], ...]
    #: By group, whose inputs are read no more from its first call on; ENTERED stands for what entered the block.
    spent: tuple[tuple[int, ...], ...]


ENTERED = -1


def find_groups(block: nn.Module, linears: Mapping[str, nn.Module], run: Callable[[], Tensor]) -> Groups | None:
    """Learn from runs of one batch. None if a layer is not called, or called twice: then they can't be settled in turn.

    What is spent is found by trying: it is overwritten, and the same comes out. A frame holds its arguments for as long as it runs,
    whether or not it reads them again, and texts that wait would hold them with it. What the block is given beside the hidden states
    is not the run's own: other blocks read it, too.
    """
    seen: list[tuple[Tensor, list[str]]] = []
    lent: set[int] = set()

    def take(name: str, inputs: Tensor) -> None:
        group = next((names for tensor, names in seen if tensor is inputs), None)
        if group is None:
            seen.append((inputs, [name]))
        else:
            group.append(name)

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        lent.update(_place(one) for one in tree_leaves((args[1:], dict(kwargs))) if isinstance(one, Tensor))

    handle = block.register_forward_pre_hook(enter, with_kwargs=True)
    with _hooks({name: _Hook(take, name) for name in linears}, linears):
        exact = run()
    handle.remove()
    layers = tuple(tuple(names) for _, names in seen)
    if sorted(name for names in layers for name in names) != sorted(linears):
        return None
    own = [ENTERED, *(group for group, (inputs, _) in enumerate(seen) if _place(inputs) not in lent)]
    seen.clear()
    spent: list[tuple[int, ...]] = []
    for group in range(len(layers)):
        earlier = [one for one in own if one < group and not any(one in others for others in spent)]
        spent.append(tuple(one for one in earlier if _comes_out(block, linears, layers, one, group, run, exact)))
    return Groups(layers, tuple(spent))


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _comes_out(
    block: nn.Module,
    linears: Mapping[str, nn.Module],
    layers: Sequence[Sequence[str]],
    overwritten: int,
    at: int,
    run: Callable[[], Tensor],
    exact: Tensor,
) -> bool:
    """Whether a run ends in the same if a group's inputs are overwritten when another group's come."""
    given: dict[int, Tensor] = {}

    def enter(_name: str, inputs: Tensor) -> None:
        given[ENTERED] = inputs

    def take(name: str, inputs: Tensor) -> None:
        for group, names in enumerate(layers):
            if name == names[0]:
                given[group] = inputs
                if group == at:
                    given[overwritten].fill_(torch.nan)

    hooks = {name: _Hook(take, name) for name in linears} | {"": _Hook(enter, "")}
    with _hooks(hooks, {**linears, "": block}):
        return torch.equal(run(), exact)


class InTurn:
    """Runs that stop at each group of layers until all have shown their inputs and the group is settled: one forward pass settles a block.

    Each run is a greenlet, so that its frames keep what it has computed, less what is spent. Within a block every layer sees inputs that
    the layers before it, settled already, have made: what Frantar et al. call true sequential (GPTQ, arXiv 2210.17323, section 4).
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
        """Run all. `watch` is told each run's inputs of a group, and the run's number; `settle` is called for each group in turn.

        to_the_end: go on behind the last group, too; what comes out is asked for.
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
                    _let_go(shown[run, spent]())
                watch(inputs, run)
                hub.switch(group)
            elif shown[run, group]() is not inputs:
                raise RuntimeError(f"{name} is not given what its neighbours are given")

        waiting = [greenlet(one) for one in runs]
        numbers: dict[Any, int] = {one: at for at, one in enumerate(waiting)}
        hooks = {name: _Hook(stop, name) for name in self._group_of} | {"": _Hook(enter, "")}
        try:
            with _hooks(hooks, self._modules):
                for group, names in enumerate(self._groups.layers):
                    for one in waiting:
                        if one.switch() != group:
                            raise RuntimeError("A block's layers are not called in the same order for every batch")
                    settle(names)
                while waiting and to_the_end:
                    waiting.pop(0).switch()  # what it held is free when it ends
        finally:
            for one in waiting:
                one.throw()  # no garbage collector looks into frames that wait: they would be held for good


def _let_go(spent: Tensor | None) -> None:
    """Free a tensor's memory, whoever holds it; if it were read again after all, its shape would not fit."""
    if spent is not None:
        spent.set_(spent.new_empty(0))  # type: ignore[call-overload]


@contextmanager
def _hooks(hooks: "Mapping[str, _Hook]", modules: Mapping[str, nn.Module]) -> Iterator[None]:
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
        return {name: one for name, one in samples.items() if not name.endswith("attention_mask")}, None
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
