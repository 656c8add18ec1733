"""Parameters that are shared out among several processes by FSDP2 (torch's `fully_shard`).

Each process has some rows of every trainable parameter, of its gradient and of its two moments. Whole weights exist for the time in which
they are used: those of a large model block by block, those of a small one from the forward pass to the backward pass.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from nightpress.core.compress.executors.objective import Objective
from nightpress.core.compress.executors.parameters import Parameters
from nightpress.core.compress.model.rows import possible_rows
from nightpress.core.compress.ranks.group import Group
from nightpress.core.recipes.passes.training import SHARED_OUT_BYTES

#: Bytes of frozen parameters up to which every process holds all of them. They need no exchange then.
_REPLICATED = 4 << 30


class ShardedParameters(Parameters):
    """A module whose trainable parameters are shared out among several processes."""

    def __init__(self, module: Objective, given: Objective, group: Group) -> None:
        """module: a copy of `given`, sharded by `fully_shard`."""
        learned = {name: part for name, part in module.named_parameters() if part.requires_grad}
        self._sharded = {name: part for name, part in learned.items() if isinstance(part, DTensor)}
        self._given = given
        own = {name: parameter.to_local().detach().requires_grad_() for name, parameter in self._sharded.items()}
        super().__init__(module, own, group)

    def take_gradients(self) -> None:
        for name, parameter in self._sharded.items():
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                assert isinstance(gradient, DTensor)
                self.own[name].grad = gradient.to_local()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._sharded[name].shape)

    def rows(self, name: str) -> slice:
        # As torch.chunk divides: all parts but the last ones are equal.
        size = -(-self.shape(name)[0] // self._group.size)
        return slice(self._group.rank * size, (self._group.rank + 1) * size)

    def whole(self, name: str, part: Tensor) -> Tensor:
        like = self._sharded[name]
        if part.dim() == 0:  # the optimizer's count of steps
            return part
        joined = DTensor.from_local(
            part.detach(), like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
        return joined.full_tensor()

    def between_batches(self) -> None:
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @torch.no_grad()
    def settle(self) -> None:
        parameters, buffers = dict(self._given.named_parameters()), dict(self._given.named_buffers())
        for name, part in self.own.items():
            parameters[name].copy_(self.whole(name, part))
        for name, buffer in self.module.named_buffers():
            buffers[name].copy_(buffer)


def share_out(module: Objective, group: Group, device: torch.device) -> ShardedParameters:
    """Share out a copy of a module, see `holding.hold`."""
    trained = _copy(module)
    learned = sum(parameter.nbytes for parameter in trained.parameters() if parameter.requires_grad)
    _shard(trained, group, device, by_block=learned >= SHARED_OUT_BYTES)
    for method in ("losses", "validate"):
        register_fsdp_forward_method(trained, method)
    for inner in trained.modules():
        if isinstance(inner, FSDPModule):  # a sum, by the one operation that all backends have
            inner.set_gradient_divide_factor(1.0)
            inner.set_force_sum_reduction_for_comms(True)
    return ShardedParameters(trained, module, group)


def share_out_frozen(model: Any, group: Group, device: torch.device) -> None:
    """Put a model that does not learn on the device, see `holding.hold_frozen`."""
    if isinstance(model, FSDPModule):
        return
    if sum(parameter.nbytes for parameter in model.parameters()) > _REPLICATED:
        _shard(model, group, device, by_block=True)
    else:
        model.to(device)


def _shard(module: nn.Module, group: Group, device: torch.device, *, by_block: bool) -> None:
    mesh = DeviceMesh(device.type, list(range(group.size)))
    frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
    replicate = sum(parameter.nbytes for parameter in frozen) <= _REPLICATED
    # FSDP gathers floats with one or more dimensions. Codes of rounded weights stay in every process.
    ignored = {
        parameter
        for parameter in frozen
        if replicate or parameter.dim() == 0 or parameter.dtype not in {torch.float32, torch.bfloat16, torch.float16}
    }
    for parameter in ignored:
        parameter.data = parameter.data.to(device)
    if by_block:
        for _, row in possible_rows(module):
            for block in row:
                if any(parameter not in ignored for parameter in block.parameters()):
                    fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=ignored)
    fully_shard(module, mesh=mesh, reshard_after_forward=False, ignored_params=ignored)


def _copy(module: Objective) -> Objective:
    """Copy a module, but not the memory of its parameters."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    return copy.deepcopy(module, memo)
