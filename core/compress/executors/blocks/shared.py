"""Hands settled tensors round between the processes that settle a block."""

from collections.abc import Mapping

import torch
from torch import Tensor

from nightpress.core.compress.executors.blocks.method import FinalTensor
from nightpress.core.compress.ranks.group import Group


def same_everywhere(group: Group, settled: Mapping[str, FinalTensor]) -> Mapping[str, FinalTensor]:
    """Replace the weights by those of the first process, which writes the block.

    All processes have computed the same ones. A library may still round otherwise on another device, and a resumed run has the first
    process's weights in all processes.
    """
    if group.size == 1:
        return settled
    agreed = dict(settled)
    for name in sorted(settled):
        final = settled[name]
        weight = final.weight.contiguous()
        group.hand_round(weight)
        written = {key: weight if tensor is final.weight else tensor for key, tensor in final.tensors.items()}
        agreed[name] = FinalTensor(weight, written, final.effect)
    return agreed


def merge_settled(group: Group, own: Mapping[str, FinalTensor], device: torch.device) -> dict[str, FinalTensor]:
    """All tensors that the processes have settled. Each name was settled by a single process.

    device: of this process, for the tensors that the others have on theirs.
    """
    if group.size == 1:
        return dict(own)
    sent: dict[str, Tensor] = {}
    described = {}
    for name, final in own.items():
        alike = [key for key, tensor in final.tensors.items() if tensor is final.weight]
        sent |= {f"{name}\n": final.weight}
        sent |= {f"{name}\n{key}": tensor for key, tensor in final.tensors.items() if key not in alike}
        described[name] = (list(final.tensors), alike, final.effect)
    tensors = group.merge(sent, device)
    merged: dict[str, FinalTensor] = {}
    for found in group.collect(described):
        for name, (keys, alike, effect) in found.items():
            weight = tensors[f"{name}\n"]
            written = {key: weight if key in alike else tensors[f"{name}\n{key}"] for key in keys}
            merged[name] = FinalTensor(weight, written, effect)
    return merged
