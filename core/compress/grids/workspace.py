"""Reusable buffers."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Workspace:
    """Buffers that one thread reuses for every chunk: allocating new ones would cost more than the arithmetic."""

    _flat: dict[tuple[str, torch.dtype], Tensor] = field(default_factory=dict)
    _views: dict[tuple[str, torch.dtype, tuple[int, ...]], Tensor] = field(default_factory=dict)

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor. It overwrites any tensor that was taken before with the same name and dtype."""
        view = self._views.get((name, dtype, shape))
        if view is None:
            count = math.prod(shape)
            flat = self._flat.get((name, dtype))
            if flat is None or flat.numel() < count:
                flat = self._flat[name, dtype] = torch.empty(count, dtype=dtype)
                self._views = {key: kept for key, kept in self._views.items() if key[:2] != (name, dtype)}
            view = self._views[name, dtype, shape] = flat[:count].view(shape)
        return view
