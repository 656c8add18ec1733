"""Storage for the hidden states of all calibration samples between two blocks."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import torch
from torch import Tensor

_GPU_SHARE = 0.3  #: share of the GPU's free memory that hidden states may take
_HOST_SHARE = 0.25  #: the same of the host's available memory


class HiddenStates:
    """The hidden states [samples, length, width] of all samples between two blocks, in batches.

    They are kept on the device, in host memory, or in a memory-mapped file: the first of these that has enough room.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        sizes: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        folder: Path,
        processes: int = 1,
    ) -> None:
        """sizes: the number of samples in each batch. processes: those of this host that keep as many hidden states."""
        self.shape, self._device = shape, device
        needed = torch.Size(shape).numel() * dtype.itemsize
        on_gpu = device.type == "cuda" and needed < _GPU_SHARE * torch.cuda.mem_get_info(device)[0]
        in_file = not on_gpu and processes * needed >= _HOST_SHARE * psutil.virtual_memory().available
        #: True: `take` and `put` pass a batch's own tensor. False: each batch has a fixed place in memory or in the file, and is copied.
        self._handed_out = not in_file and (on_gpu or device.type == "cpu")
        self._batches: list[Tensor] = []
        if in_file:
            self._batches = list(torch.split(_mapped(shape, dtype, folder), list(sizes)))
        elif not self._handed_out:
            self._batches = [torch.empty((size, *shape[1:]), dtype=dtype, pin_memory=True) for size in sizes]
        else:
            self._batches = [torch.empty(0, dtype=dtype, device=device) for _ in sizes]

    @property
    def device(self) -> torch.device:
        """The device on which they are stored: a GPU, or the host."""
        return self._batches[0].device

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Tensor]:
        """Each batch [B, length, width], on the device on which it is stored."""
        return iter(self._batches)

    def look_at(self, number: int) -> Tensor:
        """A batch on the compute device. The caller must not change it."""
        return self._batches[number].to(self._device, non_blocking=True)

    def take(self, number: int) -> Tensor:
        """A batch on the compute device. The caller may change it, and must `put` the next hidden states in its place."""
        taken = self._batches[number]
        if self._handed_out:
            self._batches[number] = taken.new_empty(0)
            return taken
        return taken.to(self._device, non_blocking=True).view_as(taken)

    def put(self, number: int, batch: Tensor) -> None:
        if self._handed_out:
            self._batches[number] = batch
        else:
            self._batches[number].copy_(batch)


def _mapped(shape: tuple[int, ...], dtype: torch.dtype, folder: Path) -> Tensor:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"hidden-states-{os.getpid()}.bin"
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    room = torch.from_file(str(path), shared=True, size=torch.Size(shape).numel(), dtype=dtype)
    path.unlink()  # the file exists as long as it is mapped
    return room.view(shape)
