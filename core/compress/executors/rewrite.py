"""What the stream executor is told to do with a tensor, and what it is told back."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nightpress.core.compress.grids.workspace import Workspace
from nightpress.core.recipes.header import TensorInfo

#: (output tensor's name, byte offset in it, its bytes)
Put = Callable[[str, int, Tensor], None]


@dataclass(frozen=True)
class Effect:
    """What a rewrite did to a chunk, or to a tensor: sums, so that they add up."""

    squared_error: float = 0.0  #: Σ (w − ŵ)²
    squared_norm: float = 0.0  #: Σ w²
    zeros: int = 0

    def __add__(self, other: "Effect") -> "Effect":
        return Effect(
            self.squared_error + other.squared_error, self.squared_norm + other.squared_norm, self.zeros + other.zeros
        )

    @property
    def relative_error(self) -> float:
        """‖w − ŵ‖ / ‖w‖; 0 for a tensor of zeros, which any grid holds."""
        return (self.squared_error / self.squared_norm) ** 0.5 if self.squared_norm else 0.0


class Rewrite(Protocol):
    """What becomes of one tensor. Called by several threads at once, each with its own workspace."""

    @property
    def outputs(self) -> tuple[TensorInfo, ...]: ...

    @property
    def row_step(self) -> int:
        """Chunks start at multiples of it."""

    def __call__(self, rows: Tensor, first_row: int, put: Put, workspace: Workspace) -> Effect: ...


def becomes(info: TensorInfo, rewrite: Rewrite | None) -> tuple[TensorInfo, ...]:
    """The tensors that stand for this one afterwards."""
    return (info,) if rewrite is None else rewrite.outputs


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, in place."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # an array is a buffer
