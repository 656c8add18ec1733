"""Hands settled tensors round between the processes that settle a block."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nightpress.core.compress.executors.blocks.method import FinalTensor, Written
from nightpress.core.compress.ranks.group import Group

_PIECE_BYTES = 64 * 1024**2  #: of settled tensors that travel at once


def same_everywhere(group: Group, settled: Mapping[str, FinalTensor]) -> Mapping[str, FinalTensor]:
    """Replace the weights by those of the first process, which writes the block, but for weights that were joined from rows of all.

    All processes have computed the same ones. A library may still round otherwise on another device, and a resumed run has the first
    process's weights in all processes.
    """
    if group.size == 1:
        return settled
    agreed = dict(settled)
    for name in sorted(settled):
        final = settled[name]
        if final.joined:
            continue
        weight = final.weight.contiguous()
        group.hand_round(weight)
        written = {key: weight if tensor is final.weight else tensor for key, tensor in final.tensors.items()}
        agreed[name] = FinalTensor(weight, written, final.effect)
    return agreed


class _Part(NamedTuple):
    """A tensor to be sent."""

    name: str  #: of the settled tensor that it is written for
    key: str  #: its own name
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def bring_to_first(group: Group, own: Mapping[str, Written], device: torch.device) -> dict[str, Written]:
    """Send what is to be written of this process's own tensors to the first process. Returns there what came, by rank; else nothing.

    device: of this process, on which the tensors travel and arrive.
    """
    parts = [
        _Part(name, key, tuple(tensor.shape), tensor.dtype)
        for name, written in own.items()
        for key, tensor in written.tensors.items()
    ]
    told = group.collect((parts, {name: written.effect for name, written in own.items()}))
    sendings = [list(_pieces(others)) if rank else [] for rank, (others, _) in enumerate(told)]
    found: dict[str, dict[str, Tensor]] = {name: {} for _, effects in told[1:] for name in effects}
    for number in range(max(map(len, sendings))):
        coming = [pieces[number] if number < len(pieces) else [] for pieces in sendings]
        sizes = [sum(part.nbytes for part in piece) for piece in coming]
        mine = [_bytes_of(own[part.name].tensors[part.key].to(device)) for part in coming[group.rank]]
        sent = torch.cat([torch.empty(0, dtype=torch.uint8, device=device), *mine])
        nothing = [0] * group.size
        arrived = group.exchange(sent, [len(sent), *nothing[1:]], sizes if group.first else nothing)
        if group.first:
            incoming = [part for piece in coming for part in piece]
            for part, data in zip(incoming, torch.split(arrived, [part.nbytes for part in incoming]), strict=True):
                found[part.name][part.key] = data.clone().view(part.dtype).view(part.shape)
    if not group.first:
        return {}
    return {name: Written(found[name], effect) for _, effects in told[1:] for name, effect in effects.items()}


def _pieces(parts: Sequence[_Part]) -> Iterator[list[_Part]]:
    """Divide tensors into pieces that travel at once."""
    piece: list[_Part] = []
    for part in parts:
        if piece and sum(other.nbytes for other in piece) + part.nbytes > _PIECE_BYTES:
            yield piece
            piece = []
        piece.append(part)
    if piece:
        yield piece


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
