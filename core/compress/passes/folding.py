"""Factors that linear layers and what stands before them exchange, the model's function staying as it is.

Where a family's parts lie is written down by its name (architectures.py). Whether factors may be exchanged there is proved on the model
at hand, block by block, since keys of its config change a block's shape: OPT's norms stand before or behind its layers.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice

import torch
from torch import Tensor

from nightpress.core.compress.executors.blocks import Inputs, Statistic
from nightpress.core.compress.executors.live_block import LiveBlock
from nightpress.core.compress.model.families import FOLDS, Fold
from nightpress.core.recipes.header import ModelHeader

#: Of the change that scaling the targets alone makes. A true fold leaves less than a millionth, a false one a fifth and more.
_SAME = 1e-3


@dataclass(frozen=True)
class FoldTarget:
    """Some of the layers that take what a source puts out, given the same of it."""

    names: tuple[str, ...]  #: of their weights
    statistic: Statistic
    share: float  #: how many of the tokens that the statistic has seen come to them, of 1


@dataclass(frozen=True)
class BlockFold:
    """A fold in one block, by the names of its tensors."""

    source: str  #: weight of what puts the inputs out
    bias: str  #: its bias; it may have none
    parts: tuple[FoldTarget, ...]  #: all layers that take them, and are rounded: one part, but for experts
    routers: tuple[str, ...]  #: weights of those that take them, and are not
    kind: str
    share: tuple[int, int]  #: (heads, width): inputs are heads · repeats · width, and a head's repeats share a factor

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(name for part in self.parts for name in part.names)

    def apply(self, factors: Tensor, block: Mapping[str, Tensor], floats: dict[str, Tensor]) -> None:
        """Multiply the targets' columns by factors [in], and divide what the source puts out by them. `floats` gets what changes."""
        self.scale_targets(factors, block, floats)
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

    def scale_targets(self, factors: Tensor, block: Mapping[str, Tensor], floats: dict[str, Tensor]) -> None:
        """Multiply the columns of all that take the inputs: half of `apply`."""
        for name in (*self.targets, *self.routers):
            floats[name] = _float(name, block, floats, factors) * factors

    def fits(self, block: Mapping[str, Tensor]) -> bool:
        """Whether the source has a weight, and puts out as many numbers as the targets take in."""
        if self.source not in block:
            return False
        columns, rows = {block[name].shape[1] for name in (*self.targets, *self.routers)}, len(block[self.source])
        if self.kind == "values":
            heads, width = self.share
            return rows == heads * width and len(columns) == 1 and columns.pop() % rows == 0
        return columns == {rows}


class Folding:
    """A family's places; none for a family that has none."""

    def __init__(self, header: ModelHeader) -> None:
        self._folds = FOLDS.get(header.model_type, ())
        config = header.config
        self._clips = config.get("clip_qkv") is not None
        heads = int(config.get("num_attention_heads") or 1)
        self._share = (
            int(config.get("num_key_value_heads") or heads),
            int(config.get("head_dim") or config.get("hidden_size", 0) // heads),
        )

    def places(self, block: LiveBlock, seen: Mapping[str, Inputs]) -> list[BlockFold]:
        """Those of a block where factors can be exchanged. The block is told what was left out because it would answer otherwise."""
        candidates = [(fold, found) for fold in self._folds if (found := list(self._candidates(fold, block, seen)))]
        proofs = _proofs([places for _, places in candidates], block)
        proved: list[BlockFold] = []
        for (fold, places), holds in zip(candidates, proofs, strict=True):
            if holds:
                proved += places
            else:
                block.warnings.append(
                    f"{fold.source} can't take factors from {', '.join(fold.targets)}: the block would answer otherwise"
                )
        return proved

    def _candidates(self, fold: Fold, block: Mapping[str, Tensor], seen: Mapping[str, Inputs]) -> Iterator[BlockFold]:
        """Those where every layer that takes the source's output, as far as the family's name says, is among the watched ones."""
        # A cache's scale was found for the values as they are, and so was a bound on them.
        if fold.kind == "values" and (self._clips or any(name.endswith(".v_scale") for name in block)):
            return
        share = self._share if fold.kind == "values" else (1, 1)
        for source, targets, routers in _named(fold, block):
            parts = _parts(targets, seen)
            if parts and all(name in block for name in routers):
                yield BlockFold(f"{source}.weight", f"{source}.bias", parts, routers, fold.kind, share)


def _proofs(folds: Sequence[Sequence[BlockFold]], block: LiveBlock) -> list[bool]:
    """Of each fold, whether the block answers as before if factors are exchanged in all its places.

    In all places at once, for an expert that is given no token shows nothing alone. What is left of the change is measured against what
    the targets alone, scaled, would make: an answer's size says nothing, since most of it passes a block by.
    """
    fits = [block.runs and all(place.fits(block) for place in places) for places in folds]
    if not any(fits):
        return fits
    trials = (trial for places, fit in zip(folds, fits, strict=True) if fit for trial in _trials(places, block))
    answers = block.answers(chain([{}], trials))
    before = next(answers)
    proofs = []
    for fit in fits:
        change, left = (float((answer - before).norm()) for answer in islice(answers, 2)) if fit else (0.0, 0.0)
        proofs.append(change > 0 and left <= _SAME * change)
    return proofs


def _trials(places: Sequence[BlockFold], block: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The tensors that change if the targets of all places are scaled, and if factors are exchanged.

    Factors are ½, 1 and 2, by which floats are multiplied without an error: a true fold changes next to no bit.
    """
    for exchange in (False, True):
        generator = torch.Generator().manual_seed(0)
        floats: dict[str, Tensor] = {}
        for place in places:
            columns = block[place.targets[0]].shape[1]
            factors = 2.0 ** torch.randint(-1, 2, (columns,), generator=generator)
            if place.kind == "values":
                heads, width = place.share
                grouped = factors.view(heads, -1, width)
                factors = grouped[:, :1].expand_as(grouped).reshape(-1)
            if exchange:
                place.apply(factors, block, floats)
            else:
                place.scale_targets(factors, block, floats)
        yield floats


def _named(fold: Fold, block: Mapping[str, Tensor]) -> Iterator[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    """A fold's source, and the weights of its targets and routers, in a block: nothing where it has no such layers."""
    first = re.escape(fold.targets[0]).replace(r"\*", r"(?P<expert>\d+)")
    found = [match for name in block if (match := re.fullmatch(rf"(?P<prefix>.*\.){first}\.weight", name))]
    if not found:
        return
    prefix, experts = found[0]["prefix"], [match.groupdict().get("expert") or "" for match in found]

    def weights(modules: tuple[str, ...], of: list[str]) -> tuple[str, ...]:
        numbered = {module: of if "*" in module else of[:1] for module in modules}
        return tuple(
            f"{prefix}{module.replace('*', number)}.weight"
            for module, numbers in numbered.items()
            for number in numbers
        )

    for some in [[expert] for expert in experts] if "*" in fold.source else [experts]:
        yield prefix + fold.source.replace("*", some[0]), weights(fold.targets, some), weights(fold.routers, some)


def _parts(targets: tuple[str, ...], seen: Mapping[str, Inputs]) -> tuple[FoldTarget, ...]:
    """The targets by what they are given. None if one is not watched, or if anything else is given the same."""
    if not all(name in seen for name in targets):
        return ()
    given: dict[tuple[int, float], list[str]] = {}
    for name in targets:
        given.setdefault((id(seen[name]), seen[name].share(name)), []).append(name)
    if not {other for name in targets for other in seen[name].names} <= set(targets):
        return ()
    # Alone, a part loses the least with the same factors, however often it is asked.
    alone = len(given) == 1
    return tuple(
        FoldTarget(tuple(names), seen[names[0]].statistic, 1.0 if alone else share)
        for (_, share), names in given.items()
    )


def _float(name: str, block: Mapping[str, Tensor], floats: Mapping[str, Tensor], like: Tensor) -> Tensor:
    return floats[name] if name in floats else block[name].to(like.device).float()
