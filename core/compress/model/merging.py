"""Merges a PEFT adapter into the weights of its base, a range of a weight's rows at a time."""

import torch
from torch import Tensor

from nightpress.core.compress.model.source import SourceTensors
from nightpress.core.recipes.adapters import Merge


class Merger:
    """What an adapter does to a single weight. Holds the adapter's matrices for it, in float32."""

    def __init__(self, merge: Merge, adapter: SourceTensors) -> None:
        self._merge = merge
        self._parts = {role: adapter.read(name).float() for role, name in merge.parts.items()}

    @property
    def needs_all_rows(self) -> bool:
        """Whether a row of the result depends on other rows of the stored weight: DoRA's norms, if the weight is stored as [in, out]."""
        return self._merge.transposed and "magnitude" in self._parts

    @property
    def replaces(self) -> bool:
        """Whether the adapter has the whole weight, so that the base's is not read."""
        return "new" in self._parts

    def rows(self, first: int, count: int) -> Tensor:
        """Rows of a weight that is replaced."""
        new = self._parts["new"]
        return new.view(-1, new.shape[-1] if new.dim() else 1)[first : first + count]

    def __call__(self, rows: Tensor, first: int) -> Tensor:
        """rows: float32 [count, columns], from `first`, of the base's weight or of the one that replaces it. Returns the rows of the merged weight."""
        if self._merge.kind == "replaced":
            return rows
        last = first + len(rows)
        a, b = self._parts["a"], self._parts["b"]
        if self._merge.kind == "embedding" or self._merge.transposed:
            merged: Tensor = rows + (b @ a[:, first:last]).t() * self._merge.scale
        else:
            merged = rows + b[first:last] @ a * self._merge.scale
        magnitude = self._parts.get("magnitude")
        if magnitude is None:
            return merged
        if self._merge.transposed:
            merged = merged * (magnitude.view(-1) / torch.linalg.vector_norm(merged, dim=0))
        else:
            merged = merged * (magnitude.view(-1)[first:last] / torch.linalg.vector_norm(merged, dim=1))[:, None]
        return merged
