"""Where calibration texts wait between two blocks: their hidden states, and what the blocks are given beside them."""

import contextlib
import ctypes
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from nightpress.core.compress.executors.skeleton import Call

_GPU_SHARE = 0.3  #: of the free memory
_HOST_SHARE = 0.25
_M_MMAP_THRESHOLD = -3  #: of malloc.h


class Waiting:
    """The hidden states [samples, length, width] of all texts between two blocks, batch by batch.

    They lie on the device, in host memory, or in a file that the kernel pages, whichever has ample room.
    """

    def __init__(
        self, shape: tuple[int, ...], batch: int, dtype: torch.dtype, device: torch.device, folder: Path
    ) -> None:
        self.shape, self._device = shape, device
        samples = shape[0]
        sizes = [min(batch, samples - at) for at in range(0, samples, batch)]
        size = torch.Size(shape).numel() * dtype.itemsize
        on_gpu = device.type == "cuda" and size < _GPU_SHARE * torch.cuda.mem_get_info(device)[0]
        in_file = not on_gpu and size >= _HOST_SHARE * psutil.virtual_memory().available
        #: Batches come and go with the runs that hold them; else there is one place for each, which they are copied from and to.
        self._come_and_go = not in_file and (on_gpu or device.type == "cpu")
        self._batches: list[Tensor] = []
        if in_file:
            self._batches = list(torch.split(_mapped(shape, dtype, folder), batch))
        elif not self._come_and_go:
            self._batches = [torch.empty((one, *shape[1:]), dtype=dtype, pin_memory=True) for one in sizes]
        else:
            self._batches = [torch.empty(0, dtype=dtype, device=device) for _ in sizes]

    @property
    def device(self) -> torch.device:
        """Where they lie."""
        return self._batches[0].device

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Tensor]:
        """Each batch [B, length, width], where it lies."""
        return iter(self._batches)

    def look_at(self, number: int) -> Tensor:
        """A batch on the device, to be left as it is."""
        return self._batches[number].to(self._device, non_blocking=True)

    def take(self, number: int) -> Tensor:
        """A batch on the device, for the caller to use up; another is put in its place afterwards."""
        taken = self._batches[number]
        if self._come_and_go:
            self._batches[number] = taken.new_empty(0)
            return taken
        return taken.to(self._device, non_blocking=True).view_as(taken)

    def put(self, number: int, batch: Tensor) -> None:
        if self._come_and_go:
            self._batches[number] = batch
        else:
            self._batches[number].copy_(batch)


def _mapped(shape: tuple[int, ...], dtype: torch.dtype, folder: Path) -> Tensor:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "hidden-states.bin"
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    room = torch.from_file(str(path), shared=True, size=torch.Size(shape).numel(), dtype=dtype)
    path.unlink()  # the mapping keeps the file for as long as it is needed
    return room.view(shape)


def return_freed_memory() -> None:
    """Give the kernel back what was freed. glibc keeps it, in holes that the next block's tensors don't fit: up to half as much again."""
    with contextlib.suppress(OSError, AttributeError):  # another C library has no such call
        ctypes.CDLL(None).malloc_trim(0)


def give_large_tensors_pages_of_their_own() -> None:
    """Let glibc map every tensor of two megabytes or more by itself, from now on in this process: what is freed goes back whole.

    Left alone it raises that bound with each one that is freed, and texts that wait then leave holes that nothing fits.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2 * 1024**2)


class Calls:
    """What each block is given beside the hidden states, batch by batch. What is the same for two batches is kept once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._batches: list[list[tuple[int, Call]]] = []

    def add(self, heard: list[tuple[int, Call]], *, keep_on: torch.device) -> None:
        """Take in the calls of the next batch. Tensors that no earlier batch had are kept on that device."""
        for earlier in (self._batches[0], self._batches[-1]) if self._batches else ():
            if _same(earlier, heard):
                self._batches.append(earlier)
                return
        if self._batches:
            moved: dict[int, Tensor] = {}
            heard = [(index, _moved(call, keep_on, moved)) for index, call in heard]
        self._batches.append(heard)

    def runs(self, index: int) -> int:
        """How often a block runs."""
        return sum(one == index for one, _ in self._batches[0])

    def of(self, index: int, batch: int) -> list[Call]:
        """The calls of a block's runs, one after the other, on the device."""
        moved: dict[int, Tensor] = {}
        return [_moved(call, self._device, moved) for one, call in self._batches[batch] if one == index]


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one.to(other.device), other)
    if isinstance(one, Call):
        return _same(one.args, other.args) and _same(one.kwargs, other.kwargs)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def _moved(value: Any, device: torch.device, moved: dict[int, Tensor]) -> Any:
    """The same with every tensor on a device; one that stands in several places is moved once."""
    if isinstance(value, Tensor):
        if value.device == device:
            return value
        if id(value) not in moved:
            moved[id(value)] = value.to(device, non_blocking=True)
        return moved[id(value)]
    if isinstance(value, Call):
        return Call(_moved(value.args, device, moved), _moved(value.kwargs, device, moved))
    if isinstance(value, Mapping):
        return {key: _moved(one, device, moved) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_moved(one, device, moved) for one in value)
    return value
