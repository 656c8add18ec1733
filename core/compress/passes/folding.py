"""Scale factors between linear layers and the layer before them: columns are multiplied, the layer before is divided. The function stays.

`model/families.py` lists the candidate places of each family. Whether they are valid is tested on the given model, block by block,
because keys of the config change a block's structure: for example, OPT's norms come before or after its layers.
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

#: Largest change of a block's output under a valid fold, as a share of the change from scaling the targets alone. A valid fold changes less
#: than a millionth of that, an invalid fold a fifth or more.
_SAME = 1e-3


@dataclass(frozen=True)
class FoldTarget:
    """Linear layers that read a source's output, and that receive the same tokens of it."""

    names: tuple[str, ...]  #: names of their weights
    statistic: Statistic  #: of their inputs
    share: float  #: fraction of the statistic's tokens that reach these layers


@dataclass(frozen=True)
class BlockFold:
    """A place in one block where factors can be exchanged, by the names of its tensors."""

    source: str  #: weight of the layer whose output the targets read
    bias: str  #: name of its bias; the block may have no such tensor
    parts: tuple[
        FoldTarget, ...
    ]  #: all layers that read this output and are rounded; only experts need more than one part
    routers: tuple[str, ...]  #: weights of the layers that read this output and stay in float
    kind: str  #: as `Fold.kind`
    share: tuple[
        int, int
    ]  #: (heads, width): inputs are heads · repeats · width, and the repeats of a head share a factor

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(name for part in self.parts for name in part.names)

    def apply(self, factors: Tensor, block: Mapping[str, Tensor], floats: dict[str, Tensor]) -> None:
        """Multiply the targets' columns by factors [in], and divide the source's output by them. Writes the changed tensors to `floats`."""
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
        """Multiply the columns of all layers that read the source's output: the first half of `apply`."""
        for name in (*self.targets, *self.routers):
            floats[name] = _float(name, block, floats, factors) * factors

    def fits(self, block: Mapping[str, Tensor]) -> bool:
        """Return whether the source has a weight, and its number of outputs matches the targets' number of inputs."""
        if self.source not in block:
            return False
        columns, rows = {block[name].shape[1] for name in (*self.targets, *self.routers)}, len(block[self.source])
        if self.kind == "values":
            heads, width = self.share
            return rows == heads * width and len(columns) == 1 and columns.pop() % rows == 0
        return columns == {rows}


class Folding:
    """Finds the places of a model's blocks where factors can be exchanged. Some families have none."""

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
        """Return the places of a block where factors can be exchanged.

        seen: name of a weight → its inputs. A place that would change the block's output is left out, and `block.warnings` names it.
        """
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
        """Yield the places of a fold whose targets are all watched. The family's table lists the layers that read the source's output."""
        # The scale of a key/value cache and the bound `clip_qkv` hold for the values without factors.
        if fold.kind == "values" and (self._clips or any(name.endswith(".v_scale") for name in block)):
            return
        share = self._share if fold.kind == "values" else (1, 1)
        for source, targets, routers in _named(fold, block):
            parts = _parts(targets, seen)
            if parts and all(name in block for name in routers):
                yield BlockFold(f"{source}.weight", f"{source}.bias", parts, routers, fold.kind, share)


def _proofs(folds: Sequence[Sequence[BlockFold]], block: LiveBlock) -> list[bool]:
    """Return for each fold whether the block's output stays the same when factors are exchanged in all its places.

    All places of a fold are tested at once: an expert that receives no token would show no change alone. The change is compared with the
    change from scaling the targets alone. The size of the output is no measure, because most of it is the residual stream.
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


def _trials(places: Sequence[BlockFold], block: LiveBlock) -> Iterator[dict[str, Tensor]]:
    """Yield two sets of changed tensors: with the targets of all places scaled alone, then with factors exchanged.

    Factors are ½, 1 and 2: floats are multiplied by them without rounding, so that a valid fold changes almost no bit.
    """
    for exchange in (False, True):
        generator = torch.Generator().manual_seed(0)
        floats: dict[str, Tensor] = {}
        for place in places:
            columns = block[place.targets[0]].shape[1]
            factors = (2.0 ** torch.randint(-1, 2, (columns,), generator=generator)).to(block.device)
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
    """Yield (source module, weights of the targets, weights of the routers) of a fold; nothing if the block has no such layers."""
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
    """Group the targets by the tokens that they receive. Empty if a target is not watched, or if another layer reads the same input."""
    if not all(name in seen for name in targets):
        return ()
    given: dict[tuple[int, float], list[str]] = {}
    for name in targets:
        given.setdefault((id(seen[name]), seen[name].share(name)), []).append(name)
    if not {other for name in targets for other in seen[name].names} <= set(targets):
        return ()
    # The share weighs parts against each other. With a single part it does not change the best factors.
    alone = len(given) == 1
    return tuple(
        FoldTarget(tuple(names), seen[names[0]].statistic, 1.0 if alone else share)
        for (_, share), names in given.items()
    )


def _float(name: str, block: Mapping[str, Tensor], floats: Mapping[str, Tensor], like: Tensor) -> Tensor:
    return floats[name] if name in floats else block[name].to(like.device).float()
