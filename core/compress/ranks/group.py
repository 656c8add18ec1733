"""The processes that compute one model together, as one of them sees the others.

All processes call the same methods in the same order. Each works on its own device: tensors on a GPU travel by NCCL, the others by gloo.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

Item = TypeVar("Item")


class PeerError(Exception):
    """The other processes did not take part: one has ended, or did not answer in time."""


class Group:
    """`size` processes; this is number `rank`. With a single process, every method returns at once."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def first(self) -> bool:
        """Whether this process writes files and reports progress."""
        return self.rank == 0

    def share(self, count: int, turn: int = 0) -> slice:
        """This process's part of `count` items: neighbours, and as many as the others have or one fewer.

        turn: number of a division; those who get one item fewer are others each time.
        """
        return self.share_of_rank((self.rank - turn) % self.size, count)

    def share_of_rank(self, rank: int, count: int) -> slice:
        """The part of `count` items that `share(count)` gives to a process."""
        return slice(rank * count // self.size, (rank + 1) * count // self.size)

    def portion(self, costs: Sequence[float]) -> list[list[int]]:
        """Share out items by their costs. Returns the indices of each process's items, ascending.

        The costliest item goes first, to the process with the least work so far.
        """
        loads = [0.0] * self.size
        found: list[list[int]] = [[] for _ in range(self.size)]
        for item in sorted(range(len(costs)), key=lambda at: (-costs[at], at)):
            least = loads.index(min(loads))
            loads[least] += costs[item]
            found[least].append(item)
        return [sorted(items) for items in found]

    # All of these wait for the other processes. ----------------------------------------------------------------------

    def sum(self, tensor: Tensor) -> None:
        """Replace a tensor by the sum of all processes' tensors. Every process gets the same bits."""
        if self.size > 1:
            self._reduce(tensor, dist.ReduceOp.SUM)

    def largest(self, tensor: Tensor) -> None:
        """Replace a tensor by the largest values of all processes' tensors."""
        if self.size > 1:
            self._reduce(tensor, dist.ReduceOp.MAX)

    def total(self, count: int) -> int:
        """The sum of all processes' counts."""
        found = torch.tensor(count)  # on the CPU: a GPU would have to be waited for
        self.sum(found)
        return int(found)

    def mean(self, part: Tensor, share: Tensor | float) -> Tensor:
        """The mean over all processes of a value that each has for its part. share: this process's share, 0 to 1; all shares add up to 1."""
        whole = part * share
        self.sum(whole)
        return whole

    def share_of(self, count: Tensor) -> Tensor | float:
        """This process's share of the sum of all processes' counts. count: 0-dimensional."""
        if self.size == 1:
            return 1.0
        whole = count.float()
        self.sum(whole)
        return count / whole.clamp(min=1)

    def collect(self, value: Item) -> list[Item]:
        """The values of all processes, by rank. They are pickled: for small values."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with _of_peers():
            dist.all_gather_object(found, value)
        return found

    def hand_round(self, tensor: Tensor, owner: int = 0) -> None:
        """Overwrite a contiguous tensor by the owner's, bit by bit."""
        if self.size > 1 and tensor.numel():
            with _of_peers():
                dist.broadcast(tensor.view(-1).view(torch.uint8), owner)

    def exchange(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Send each process some of the rows [rows, width]: the first `sent[0]` to process 0, and so on. Returns what came, by rank.

        received: the number of rows that each process sends to this one. All numbers may be 0.
        """
        if self.size == 1:
            return rows
        found = rows.new_empty(sum(received), *rows.shape[1:])
        width = rows.shape[1:].numel() * rows.itemsize
        with _of_peers():
            dist.all_to_all_single(
                found.view(-1).view(torch.uint8),
                rows.contiguous().view(-1).view(torch.uint8),
                [count * width for count in received],
                [count * width for count in sent],
            )
        return found

    def join_rows(self, part: Tensor, count: int) -> Tensor:
        """Join the parts [part, …] that `share(count)` gave to each process: [count, …]."""
        if self.size == 1 or not count:
            return part
        most = -(-count // self.size)  # the parts travel with equal lengths, as all backends want them
        equal = part.contiguous()
        if len(part) < most:
            equal = part.new_empty(most, *part.shape[1:])
            equal[: len(part)] = part
        joined = part.new_empty(self.size * most, *part.shape[1:])
        gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name since torch 2.13
        with _of_peers():
            gather(joined.view(-1).view(torch.uint8), equal.view(-1).view(torch.uint8))
        if len(joined) == count:
            return joined
        lengths = [len(range(count)[self.share_of_rank(rank, count)]) for rank in range(self.size)]
        return torch.cat([rows[:length] for rows, length in zip(torch.split(joined, most), lengths, strict=True)])

    def merge(self, own: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """The tensors of all processes by name. A name belongs to a single process. Tensors are on the CPU, or on this process's `device`."""
        if self.size == 1:
            return dict(own)
        described = {name: (tuple(tensor.shape), tensor.dtype, tensor.is_cpu) for name, tensor in own.items()}
        merged: dict[str, Tensor] = {}
        for rank, found in enumerate(self.collect(described)):
            for name, (shape, dtype, on_cpu) in found.items():
                tensor = own[name].contiguous() if rank == self.rank else None
                if tensor is None:
                    tensor = torch.empty(shape, dtype=dtype, device="cpu" if on_cpu else device)
                self.hand_round(tensor, rank)
                merged[name] = tensor
        return merged

    def _reduce(self, tensor: Tensor, operation: Any) -> None:
        held = tensor.float() if tensor.dtype in _SHORT else tensor.contiguous()
        with _of_peers():
            dist.all_reduce(held, operation)
        if held is not tensor:
            tensor.copy_(held)


_SHORT = {torch.float16, torch.bfloat16}  #: gloo does not reduce all of these

ALONE = Group()


@contextmanager
def exchanging() -> Iterator[None]:
    """Tell errors of the others apart from this process's own, where a library exchanges tensors beside its other work."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo/transport" not in str(error):
            raise
        raise PeerError(str(error)) from error


@contextmanager
def _of_peers() -> Iterator[None]:
    """Tell errors of the others apart from this process's own."""
    try:
        yield
    except RuntimeError as error:  # of gloo; that of NCCL is a subclass
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise PeerError(str(error)) from error
