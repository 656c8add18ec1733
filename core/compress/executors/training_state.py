"""The checkpoint of a training: one safetensors file that holds everything on which a later step depends.

Several processes write the same file as one: the first joins every tensor and writes it, one after the other. It is read by rows, so that no
process holds more than its own part.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from nightpress.core.compress.executors.parameters import Parameters
from nightpress.core.compress.model.checkpoint import SAFETENSORS_DTYPES, tensor_info, write_tensors
from nightpress.core.compress.ranks.group import Group


@dataclass
class TrainingState:
    """Everything, other than tensors, that a later step depends on."""

    step: int = 0
    best_step: int = 0
    best: float = math.inf
    waited: int = 0  #: validations since the best one
    counted: int = 0  #: steps whose losses are in the sum for the curve's next point
    names: list[str] = field(default_factory=list)  #: names of those losses
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    validation: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ReadCheckpoint:
    """What a process reads from a checkpoint: all of it, or its own rows. On the CPU."""

    state: TrainingState
    sums: Tensor
    module: Mapping[str, Tensor]
    best: Mapping[str, Tensor]
    optimizer: Mapping[str, Mapping[str, Tensor]]  #: by the parameter's name, and the name in AdamW's state


def write_checkpoint(
    file: Path, parameters: Parameters, parts: Mapping[str, Tensor], sums: Tensor, state: TrainingState, group: Group
) -> None:
    """Write a checkpoint in place of the one before it. All processes call it. Raises NightpressError(disk_full).

    parts: this process's part of each tensor, by its name in the file: `module.` or `best.` and the name of a parameter or buffer, or
    `optimizer.`, the name in AdamW's state, and that of a parameter. sums [processes, names]: losses since the curve's last point.
    """
    parts = dict(sorted(parts.items()))  # all processes must join them in the same order
    shared = {name: part.dim() > 0 and _of(name) in parameters.own for name, part in parts.items()}

    def whole(name: str) -> Tensor:
        return parameters.whole(_of(name), parts[name]) if shared[name] else parts[name]

    if not group.first:
        for name in parts:
            whole(name)
        return
    infos = [tensor_info("sums", "F64", tuple(sums.shape))]
    for name, part in parts.items():
        shape = parameters.shape(_of(name)) if shared[name] else tuple(part.shape)
        infos.append(tensor_info(name, SAFETENSORS_DTYPES[part.dtype], shape))
    file.parent.mkdir(parents=True, exist_ok=True)
    joined = ((name, whole(name).detach().cpu()) for name in parts)
    write_tensors(file, infos, chain([("sums", sums)], joined), {"state": json.dumps(asdict(state))})


def read_checkpoint(file: Path, parameters: Parameters, group: Group) -> ReadCheckpoint:
    """Read this process's part of a checkpoint."""
    found: dict[str, dict[str, Tensor]] = {"module": {}, "best": {}}
    optimizer: dict[str, dict[str, Tensor]] = {}
    with safe_open(file, framework="pt", device="cpu") as opened:
        state = TrainingState(**json.loads(opened.metadata()["state"]))
        sums = opened.get_tensor("sums")
        for name in sorted(set(opened.keys()) - {"sums"}):
            kind, rest = name.split(".", 1)
            of = _of(name)
            whole = opened.get_slice(name)
            part = whole[parameters.rows(of)] if whole.get_shape() and of in parameters.own else opened.get_tensor(name)
            if kind == "optimizer":
                optimizer.setdefault(of, {})[rest.split(".", 1)[0]] = part
            else:
                found[kind][of] = part
    own = sums.reshape(group.size, sums.numel() // group.size)[group.rank]
    return ReadCheckpoint(state, own, found["module"], found["best"], optimizer)


def _of(name: str) -> str:
    """The parameter or buffer to which a tensor in the file belongs."""
    return name.split(".", 2 if name.startswith("optimizer.") else 1)[-1]
