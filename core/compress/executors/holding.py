"""Puts what is trained, and what is only run, on the device of a process."""

from typing import Any

import torch

from nightpress.core.compress.executors.objective import Objective
from nightpress.core.compress.executors.parameters import Parameters
from nightpress.core.compress.ranks.group import Group


def hold(module: Objective, group: Group, device: torch.device) -> Parameters:
    """Put a module on the device, or this process's part of it.

    With several processes, the module itself stays on the CPU, and a copy of it is trained until `settle`. The gradients of all processes
    are added up.
    """
    if group.size == 1:
        module.to(device)
        return Parameters(module, {name: part for name, part in module.named_parameters() if part.requires_grad})
    from nightpress.core.compress.executors.sharded import share_out  # its imports take a second

    return share_out(module, group, device)


def hold_frozen(model: Any, group: Group, device: torch.device) -> None:
    """Put a model that does not learn on the device: whole, or shared out by blocks among several processes if it is large.

    Then all processes must run it at the same time.
    """
    if group.size == 1:
        model.to(device)
        return
    from nightpress.core.compress.executors.sharded import share_out_frozen

    share_out_frozen(model, group, device)
