"""The interface of the stream executor: a rewrite of a tensor, and the effect that it reports."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from nightpress.core.compress.grids.workspace import Workspace
from nightpress.core.recipes.header import TensorInfo

#: Writes part of an output: (the output tensor's name, offset in it in bytes, the data)
Put = Callable[[str, int, Tensor], None]


@dataclass(frozen=True)
class Effect:
    """What a rewrite did to a chunk or to a tensor. All fields are sums, so effects of chunks can be added."""

    squared_error: float = 0.0  #: Σ (w − ŵ)²
    squared_norm: float = 0.0  #: Σ w²
    zeros: int = 0

    def __add__(self, other: "Effect") -> "Effect":
        return Effect(
            self.squared_error + other.squared_error, self.squared_norm + other.squared_norm, self.zeros + other.zeros
        )

    @property
    def relative_error(self) -> float:
        """‖w − ŵ‖ / ‖w‖. 0 for a tensor of zeros, which any grid represents exactly."""
        return (self.squared_error / self.squared_norm) ** 0.5 if self.squared_norm else 0.0


class Rewrite(Protocol):
    """A rewrite of one tensor. Several threads call it at the same time, each with its own workspace."""

    @property
    def outputs(self) -> tuple[TensorInfo, ...]: ...

    @property
    def row_step(self) -> int:
        """Chunks start at multiples of this number of rows."""

    def __call__(self, rows: Tensor, first_row: int, put: Put, workspace: Workspace) -> Effect: ...


def becomes(info: TensorInfo, rewrite: Rewrite | None) -> tuple[TensorInfo, ...]:
    """The tensors that replace this one after the rewrite."""
    return (info,) if rewrite is None else rewrite.outputs
