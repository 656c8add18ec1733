"""The blocks' arguments other than the hidden states: masks, positions, rotary embeddings."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nightpress.core.compress.model.rows import Call


class Calls:
    """The arguments of each block other than the hidden states, for every batch.

    A batch with the same arguments as the first or the previous batch shares theirs in memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._batches: list[list[tuple[int, Call]]] = []

    def add(self, calls: list[tuple[int, Call]], *, keep_on: torch.device) -> None:
        """Add the calls of the next batch. Its tensors are kept on `keep_on`, unless it is the first or shares an earlier batch's calls."""
        for earlier in (self._batches[0], self._batches[-1]) if self._batches else ():
            if _same(earlier, calls):
                self._batches.append(earlier)
                return
        if self._batches:
            moved: dict[int, Tensor] = {}
            calls = [(index, _moved(call, keep_on, moved)) for index, call in calls]
        self._batches.append(calls)

    def runs(self, index: int) -> int:
        """How often a block runs in one forward pass."""
        return sum(at == index for at, _ in self._batches[0])

    def of(self, index: int, batch: int) -> list[Call]:
        """The calls of a block's runs on a batch, in order, with their tensors on the device."""
        moved: dict[int, Tensor] = {}
        return [_moved(call, self._device, moved) for at, call in self._batches[batch] if at == index]


def _same(value: Any, other: Any) -> bool:
    if value is other:
        return True
    if type(value) is not type(other):
        return False
    if isinstance(value, Tensor):
        return value.shape == other.shape and value.dtype == other.dtype and torch.equal(value.to(other.device), other)
    if isinstance(value, Call):
        return _same(value.args, other.args) and _same(value.kwargs, other.kwargs)
    if isinstance(value, Mapping):
        return value.keys() == other.keys() and all(_same(part, other[key]) for key, part in value.items())
    if isinstance(value, list | tuple):
        return len(value) == len(other) and all(_same(a, b) for a, b in zip(value, other, strict=True))
    return bool(value == other)


def _moved(value: Any, device: torch.device, moved: dict[int, Tensor]) -> Any:
    """The same value with every tensor on the device. A tensor that occurs several times is moved once."""
    if isinstance(value, Tensor):
        if value.device == device:
            return value
        if id(value) not in moved:
            moved[id(value)] = value.to(device, non_blocking=True)
        return moved[id(value)]
    if isinstance(value, Call):
        return Call(_moved(value.args, device, moved), _moved(value.kwargs, device, moved))
    if isinstance(value, Mapping):
        return {key: _moved(part, device, moved) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_moved(part, device, moved) for part in value)
    return value
