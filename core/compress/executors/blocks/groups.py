"""Finds which layers of a block share their inputs, and from where on these inputs are not read again."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nightpress.core.compress.executors.watch import Hook, hooked


@dataclass(frozen=True)
class Groups:
    """Layers of a block that share their inputs, in the order of their calls."""

    layers: tuple[tuple[str, ...], ...]
    #: By group: the groups whose inputs are not read again after this group's first call. ENTERED stands for the block's own input.
    spent: tuple[tuple[int, ...], ...]


ENTERED = -1


def find_groups(block: nn.Module, linears: Mapping[str, nn.Module], run: Callable[[], Tensor]) -> Groups | None:
    """Find the groups by running a batch. None if a layer is not called, or is called twice: then groups can't be settled in turn.

    Finds inputs that are not read again: overwrites each and checks that the block's output is unchanged. This matters because a Python
    frame keeps its arguments in memory while it runs, even if it does not read them again. The block's other arguments (masks, positions)
    are never overwritten, because other blocks read them, too.
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
        lent.update(_place(leaf) for leaf in tree_leaves((args[1:], dict(kwargs))) if isinstance(leaf, Tensor))

    handle = block.register_forward_pre_hook(enter, with_kwargs=True)
    with hooked({name: Hook(take, name) for name in linears}, linears):
        exact = run()
    handle.remove()
    layers = tuple(tuple(names) for _, names in seen)
    if sorted(name for names in layers for name in names) != sorted(linears):
        return None
    own = [ENTERED, *(group for group, (inputs, _) in enumerate(seen) if _place(inputs) not in lent)]
    seen.clear()
    spent: list[tuple[int, ...]] = []
    for group in range(len(layers)):
        earlier = [before for before in own if before < group and not any(before in others for others in spent)]
        spent.append(
            tuple(before for before in earlier if _is_unchanged(block, linears, layers, before, group, run, exact))
        )
    return Groups(layers, tuple(spent))


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_unchanged(
    block: nn.Module,
    linears: Mapping[str, nn.Module],
    layers: Sequence[Sequence[str]],
    overwritten: int,
    at: int,
    run: Callable[[], Tensor],
    exact: Tensor,
) -> bool:
    """Whether the block's output stays the same if the inputs of group `overwritten` become NaN at the first call of group `at`.

    Then whether it also stays the same without their memory: a read may change no output, e.g. one that chooses among few tokens.
    """

    def runs_without(spend: Callable[[Tensor], object]) -> bool:
        return torch.equal(_run_and_spend(block, linears, layers, overwritten, at, run, spend), exact)

    if not runs_without(lambda inputs: inputs.fill_(torch.nan)):
        return False
    try:
        return runs_without(let_go)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False


def let_go(spent: Tensor) -> None:
    """Free a tensor's memory, even if frames still refer to the tensor. If one of them reads it, the empty shape causes an error."""
    spent.set_(spent.new_empty(0))  # type: ignore[call-overload]


def _run_and_spend(
    block: nn.Module,
    linears: Mapping[str, nn.Module],
    layers: Sequence[Sequence[str]],
    spent: int,
    at: int,
    run: Callable[[], Tensor],
    spend: Callable[[Tensor], object],
) -> Tensor:
    given: dict[int, Tensor] = {}

    def enter(_name: str, inputs: Tensor) -> None:
        given[ENTERED] = inputs

    def take(name: str, inputs: Tensor) -> None:
        for group, names in enumerate(layers):
            if name == names[0]:
                given[group] = inputs
                if group == at:
                    spend(given[spent])

    hooks = {name: Hook(take, name) for name in linears} | {"": Hook(enter, "")}
    with hooked(hooks, {**linears, "": block}):
        return run()
