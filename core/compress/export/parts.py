"""Several processes that run one model's examples: each has the whole model, and a part of the examples of every set."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nightpress.core.compress.export.consumer_environment import Device
from nightpress.core.compress.model.checkpoint import disk_errors
from nightpress.core.compress.ranks.launch import visible_gpus


def variables_of_others(parts: int, device: Device) -> list[dict[str, str]]:
    """Environment variables of each process but the first, which runs on the first GPU. On GPUs, each sees one of its own."""
    if device == "cpu" or parts == 1:
        return [{}] * (parts - 1)
    return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in visible_gpus(parts)[1:]]


def join_outputs(file: Path, parts: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """Join the outputs of all parts in their order, and write them to the file of the first in place of its own."""
    names = dict.fromkeys(name for part in parts for name in part)
    joined = {name: np.concatenate([part[name] for part in parts if name in part]) for name in names}
    unfinished = Path(f"{file}.partial.npz")
    with disk_errors():
        np.savez(unfinished, **joined)  # type: ignore[arg-type]  # the stub takes ** for its keyword
        unfinished.replace(file)
    return joined
