"""Scale factors between linear layers and the layer before them: columns are multiplied, the layer before is divided. The function stays.

`model/families.py` lists the candidate places of some families; for all others, `fold_proposals` finds them by running a block. Whether they
are valid is tested on the given model, block by block, because keys of the config change a block's structure: for example, OPT's norms come
before or after its layers.
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
from nightpress.core.compress.passes.fold_proposals import Proposal, propose
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

    def spans(self, block: LiveBlock) -> bool:
        """Whether other processes hold further layers that read this output."""
        return _span(self.source, self.targets, block)

    def parts_of(self, block: LiveBlock) -> list[FoldTarget]:
        """The parts that this process adds to those of the others. Of parts that all processes hold, only the first adds them."""
        return [part for part in self.parts if block.group.first or part.names[0] in block.own]

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
        self._folds = FOLDS.get(header.model_type)
        #: Names of a block's tensors → the proposals that held in the first block with these tensors.
        self._held: dict[tuple[str, ...], list[tuple[Proposal, ...]]] = {}
        config = header.text_config
        self._clips = config.get("clip_qkv") is not None
        heads = _count(config.get("num_attention_heads")) or 1
        self._heads = _count(config.get("num_key_value_heads")) or heads
        self._share = (self._heads, _count(config.get("head_dim")) or _count(config.get("hidden_size")) // heads)

    def places(self, block: LiveBlock, seen: Mapping[str, Inputs]) -> list[BlockFold]:
        """Return the places of a block where factors can be exchanged.

        seen: name of a weight → its inputs. A place that would change the block's output is left out, and `block.warnings` names it.
        """
        if self._folds is None:
            return self._proposed(block, seen)
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

    def _proposed(self, block: LiveBlock, seen: Mapping[str, Inputs]) -> list[BlockFold]:
        """As `places`, for a family that the table does not name: what a run of the block proposes, and the block proves."""
        if not block.runs or not block.told_apart:
            block.warnings.append("its blocks can't be run by themselves, so that no exchange of factors can be proved")
            return []
        short = {stored: name for name, stored in block.names.items()}
        like = tuple(block.names)
        if like not in self._held:
            rounded = [short[name].removesuffix(".weight") for name in seen]
            self._held[like] = [some for some in propose(block, rounded, self._heads) if some]
        choices = self._held[like]
        places = [[self._placed(proposal, block, seen) for proposal in some] for some in choices]
        proofs = iter(_proofs([found for some in places for found in some], block))
        held: list[BlockFold] = []
        kept: list[tuple[Proposal, ...]] = []
        for some, found in zip(choices, places, strict=True):
            right = [at for at, holds in enumerate([next(proofs) for _ in found]) if holds]
            if right:
                held += found[right[0]]
                kept.append((some[right[0]],))
        self._held[like] = kept
        if not held:
            block.warnings.append(
                "no layer before its linear layers can take factors: the block would answer otherwise"
            )
        return held

    def _placed(self, proposal: Proposal, block: LiveBlock, seen: Mapping[str, Inputs]) -> list[BlockFold]:
        """Return the places of a proposal. Empty if a target is not watched, or if another layer reads the same input."""
        if proposal.kind == "values" and (self._clips or any(name.endswith(".v_scale") for name in block)):
            return []
        share = self._share_of(proposal, block)
        places = []
        for source, targets, routers in _numbered(proposal, block.names):
            parts = _parts(targets, seen, elsewhere=_span(block.names[f"{source}.weight"], targets, block))
            if not parts:
                return []
            bias = block.names.get(f"{source}.bias", "")
            places.append(BlockFold(block.names[f"{source}.weight"], bias, parts, routers, proposal.kind, share))
        return places

    def _share_of(self, proposal: Proposal, block: LiveBlock) -> tuple[int, int]:
        if proposal.kind != "values":
            return 1, 1
        rows = len(block[block.names[f"{proposal.source}.weight"]])
        return self._heads, rows // self._heads

    def _candidates(self, fold: Fold, block: LiveBlock, seen: Mapping[str, Inputs]) -> Iterator[BlockFold]:
        """Yield the places of a fold whose targets are all watched. The family's table lists the layers that read the source's output."""
        # The scale of a key/value cache and the bound `clip_qkv` hold for the values without factors.
        if fold.kind == "values" and (self._clips or any(name.endswith(".v_scale") for name in block)):
            return
        share = self._share if fold.kind == "values" else (1, 1)
        for source, targets, routers in _named(fold, block):
            parts = _parts(targets, seen, elsewhere=_span(f"{source}.weight", targets, block))
            if parts and all(name in block for name in routers):
                yield BlockFold(f"{source}.weight", f"{source}.bias", parts, routers, fold.kind, share)


def _proofs(folds: Sequence[Sequence[BlockFold]], block: LiveBlock) -> list[bool]:
    """Return for each fold whether the block's output stays the same when factors are exchanged in all its places.

    All places of a fold are tested at once: an expert that receives no token would show no change alone. The change is compared with the
    change from scaling the targets alone. The size of the output is no measure, because most of it is the residual stream.
    """
    fits = [block.runs and len(places) > 0 and all(place.fits(block) for place in places) for places in folds]
    if not any(fits):
        return fits
    trials = (trial for places, fit in zip(folds, fits, strict=True) if fit for trial in _trials(places, block))
    answers = block.answers(chain([{}], trials))
    before = next(answers)
    proofs = []
    for fit in fits:
        change, left = (float((answer - before).norm()) for answer in islice(answers, 2)) if fit else (0.0, 0.0)
        proofs.append(change > 0 and left <= _SAME * change)
    return block.group.collect(proofs)[0]


def _count(value: object) -> int:
    """A number of the config; 0 if there is none, or one for each stage of a model."""
    return value if isinstance(value, int) else 0


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


def _numbered(proposal: Proposal, names: Mapping[str, str]) -> Iterator[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    """Yield (source module, weights of the targets, weights of the routers) of a proposal: one for each expert if its source is in experts."""

    def weights(modules: tuple[str, ...], expert: str | None) -> tuple[str, ...]:
        found = []
        for module in modules:
            before, star, leaf = module.partition("*")
            if not star:
                found.append(names[f"{module}.weight"])
                continue
            pattern = re.compile(rf"{re.escape(before)}(\d+){re.escape(leaf)}\.weight")
            numbers = {name: match[1] for name in names if (match := pattern.fullmatch(name))}
            found += [names[name] for name, number in numbers.items() if expert in (None, number)]
        return tuple(found)

    before, star, leaf = proposal.source.partition("*")
    if not star:
        yield proposal.source, weights(proposal.targets, None), weights(proposal.routers, None)
        return
    pattern = re.compile(rf"{re.escape(before)}(\d+){re.escape(leaf)}\.weight")
    for name in names:
        if match := pattern.fullmatch(name):
            yield name.removesuffix(".weight"), weights(proposal.targets, match[1]), weights(proposal.routers, match[1])


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


def _span(source: str, targets: Sequence[str], block: LiveBlock) -> bool:
    """Whether some targets are experts of this process, and the source is no part of an expert: then other processes have targets, too."""
    return source not in block.own and any(name in block.own for name in targets)


def _parts(targets: tuple[str, ...], seen: Mapping[str, Inputs], *, elsewhere: bool) -> tuple[FoldTarget, ...]:
    """Group the targets by the tokens that they receive. Empty if a target is not watched, or if another layer reads the same input.

    elsewhere: whether other processes have further targets.
    """
    if not all(name in seen for name in targets):
        return ()
    given: dict[tuple[int, float], list[str]] = {}
    for name in targets:
        given.setdefault((id(seen[name]), seen[name].share(name)), []).append(name)
    if not {other for name in targets for other in seen[name].names} <= set(targets):
        return ()
    # The share weighs parts against each other. With a single part it does not change the best factors.
    alone = len(given) == 1 and not elsewhere
    return tuple(
        FoldTarget(tuple(names), seen[names[0]].statistic, 1.0 if alone else share)
        for (_, share), names in given.items()
    )


def _float(name: str, block: Mapping[str, Tensor], floats: Mapping[str, Tensor], like: Tensor) -> Tensor:
    return floats[name] if name in floats else block[name].to(like.device).float()
