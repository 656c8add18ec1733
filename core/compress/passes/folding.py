"""Factors that linear layers and what stands before them exchange, the model's function staying as it is."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from core.compress.architectures import FOLDS, Fold
from core.compress.executors.blocks import Inputs
from core.recipes.header import ModelHeader


@dataclass(frozen=True)
class Place:
    """A fold in one block, by the names of its tensors."""

    source: str  #: weight of what puts the inputs out
    bias: str  #: its bias; it may have none
    targets: tuple[str, ...]  #: weights of all layers that take them
    kind: str
    share: tuple[int, int]  #: (heads, width): inputs are heads · repeats · width, and a head's repeats share a factor

    def apply(self, factors: Tensor, block: Mapping[str, Tensor], floats: dict[str, Tensor]) -> None:
        """Multiply the targets' columns by factors [in], and divide what the source puts out by them. `floats` gets what changes."""
        for name in self.targets:
            floats[name] = floats[name] * factors
        if self.kind == "values":
            heads, width = self.share
            factors = factors.view(heads, -1, width)[:, 0].reshape(-1)
        before = _float(self.source, block, floats, factors)
        if self.kind == "norm+1":
            floats[self.source] = (1 + before) / factors - 1
        else:
            floats[self.source] = before / factors.view(-1, *[1] * (before.dim() - 1))
        if self.bias in block:
            floats[self.bias] = _float(self.bias, block, floats, factors) / factors


class Folding:
    """A family's places; none for a family that has none."""

    def __init__(self, header: ModelHeader) -> None:
        self._folds = FOLDS.get(header.model_type, ())
        config = header.config
        heads = int(config.get("num_attention_heads") or 1)
        self._share = (
            int(config.get("num_key_value_heads") or heads),
            int(config.get("head_dim") or config.get("hidden_size", 0) // heads),
        )

    def places(self, block: Mapping[str, Tensor], seen: Mapping[str, Inputs]) -> Iterator[Place]:
        """Those of a block where every layer that takes the source's output is among the watched ones."""
        for fold in self._folds:
            place = self._place(fold, seen)
            # A cache's scale was found for the values as they are.
            kept = place is not None and fold.kind == "values" and any(name.endswith(".v_scale") for name in block)
            if place is not None and not kept:
                yield place

    def _place(self, fold: Fold, seen: Mapping[str, Inputs]) -> Place | None:
        last = f"{fold.targets[0]}.weight"
        prefix = next((name.removesuffix(last) for name in seen if name.endswith("." + last)), None)
        targets = tuple(f"{prefix}{target}.weight" for target in fold.targets)
        if prefix is None or not all(name in seen for name in targets) or set(seen[targets[0]].names) != set(targets):
            return None
        source = f"{prefix}{fold.source}"
        share = self._share if fold.kind == "values" else (1, 1)
        return Place(f"{source}.weight", f"{source}.bias", targets, fold.kind, share)


def _float(name: str, block: Mapping[str, Tensor], floats: Mapping[str, Tensor], like: Tensor) -> Tensor:
    return floats[name] if name in floats else block[name].to(like.device).float()
