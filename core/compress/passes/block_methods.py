"""The methods of GPTQ, AWQ, SparseGPT and Wanda: what each sums up of a layer's inputs, and what it makes of a block's weights."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from nightpress.core.compress.executors.blocks import (
    Inputs,
    Settled,
    Statistic,
)
from nightpress.core.compress.executors.live_block import LiveBlock
from nightpress.core.compress.executors.rewrite import Effect
from nightpress.core.compress.grids.stored import Coded, dequantized, from_tensors, grid_of, round_weight, to_tensors
from nightpress.core.compress.passes.folding import Folding, Part
from nightpress.core.compress.solvers.awq import Taker, search_scales
from nightpress.core.compress.solvers.gptq import round_obs
from nightpress.core.compress.solvers.gram import Gram
from nightpress.core.compress.solvers.obs import Prune, factorize, solve
from nightpress.core.compress.solvers.wanda import Power, wanda_mask
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.passes import Awq, Gptq, SparseGpt, Wanda
from nightpress.core.recipes.schemes import Scheme

#: How the weight of a module is stored.
Schemes = Callable[[str], Scheme]


def scheme_of(schemes: Schemes, weight: str) -> Scheme:
    return schemes(weight.removesuffix(".weight"))


class _GroupByGroup:
    """A method that settles layers that share their inputs without looking at the block's other layers."""

    by_group = True

    def settle(self, block: Mapping[str, Tensor], inputs: Sequence[Inputs], device: torch.device) -> dict[str, Settled]:
        settled: dict[str, Settled] = {}
        for seen in inputs:
            settled |= self._settle({name: block[name].to(device) for name in seen.names}, seen.statistic)
        return settled

    def _settle(self, weights: Mapping[str, Tensor], statistic: Statistic) -> dict[str, Settled]:
        raise NotImplementedError


class Quantized(_GroupByGroup):
    """GPTQ (arXiv 2210.17323): codes, scales and zero points by the Optimal-Brain-Surgeon solver, or by rounding to nearest in rows where that does better."""

    def __init__(self, options: Gptq, schemes: Schemes) -> None:
        self._options, self._schemes = options, schemes
        self._prune = None if options.sparsity is None else _prune(options.sparsity, options.pattern)

    def watch(self, columns: int, device: torch.device) -> Gram:
        return Gram(columns, device)

    def _settle(self, weights: Mapping[str, Tensor], statistic: Statistic) -> dict[str, Settled]:
        assert isinstance(statistic, Gram)
        gram = statistic.matrix()
        factor = factorize(gram, damping=self._options.damping, by_power=self._options.order == "activation")
        # Rows don't depend on each other, but unstructured pruning would share its quota among the weights.
        alone = self._prune is not None and self._prune.pattern is None
        together: dict[tuple[Scheme, str], list[str]] = {}
        for name in weights:
            together.setdefault((scheme_of(self._schemes, name), name if alone else ""), []).append(name)
        settled: dict[str, Settled] = {}
        for (scheme, _), names in together.items():
            stacked = torch.cat([weights[name].float() for name in names])
            coded = round_obs(
                stacked,
                gram,
                factor,
                scheme,
                weights[names[0]].dtype,
                ranges=self._options.ranges,
                refine=self._options.refine,
                prune=self._prune,
            )
            start = 0
            for name in names:
                rows = slice(start, start + len(weights[name]))
                zero_point = None if coded.zero_point is None else coded.zero_point[rows]
                settled[name] = settle_coded(
                    name, scheme, Coded(coded.codes[rows], coded.scale[rows], zero_point), stacked[rows]
                )
                start = rows.stop
        return settled

    def restore(self, name: str, written: Mapping[str, Tensor]) -> Tensor:
        return from_tensors(name, scheme_of(self._schemes, name), written)


def settle_coded(
    name: str, scheme: Scheme, coded: Coded, before: Tensor, *, input_scale: Tensor | None = None
) -> Settled:
    """A weight on its grid, with its tensors; scales have the dtype the weight was stored in."""
    weight = dequantized(coded, scheme)
    tensors = to_tensors(name, scheme, coded, input_scale=input_scale)
    return Settled(weight=weight, tensors=tensors, effect=effect_of(before, weight))


class Sparse(_GroupByGroup):
    """SparseGPT (arXiv 2301.00774): weights under a mask; those that stay compensate for those that go."""

    def __init__(self, options: SparseGpt) -> None:
        self._damping, self._prune = options.damping, _prune(options.sparsity, options.pattern)

    def watch(self, columns: int, device: torch.device) -> Gram:
        return Gram(columns, device)

    def _settle(self, weights: Mapping[str, Tensor], statistic: Statistic) -> dict[str, Settled]:
        assert isinstance(statistic, Gram)
        factor = factorize(statistic.matrix(), damping=self._damping)
        settled = {}
        # Rows don't depend on each other, but unstructured pruning would share its quota among the weights.
        for names in [[name] for name in weights] if self._prune.pattern is None else [list(weights)]:
            before = torch.cat([weights[name].float() for name in names])
            after = solve(before, factor, prune=self._prune).weight
            counts = [len(weights[name]) for name in names]
            for name, was, now in zip(names, torch.split(before, counts), torch.split(after, counts), strict=True):
                value = now.to(weights[name].dtype, copy=True)
                settled[name] = Settled(weight=value, tensors={name: value}, effect=effect_of(was, value.float()))
        return settled

    def restore(self, name: str, written: Mapping[str, Tensor]) -> Tensor:
        return written[name]


class WeightAndActivation(_GroupByGroup):
    """Wanda (arXiv 2306.11695): weights under a mask by magnitude and input norm."""

    def __init__(self, options: Wanda) -> None:
        self._prune = _prune(options.sparsity, options.pattern)

    def watch(self, columns: int, device: torch.device) -> Power:
        return Power(columns, device)

    def _settle(self, weights: Mapping[str, Tensor], statistic: Statistic) -> dict[str, Settled]:
        assert isinstance(statistic, Power)
        settled = {}
        for name, weight in weights.items():
            gone = wanda_mask(weight, statistic.sum, self._prune.sparsity, self._prune.pattern)
            after = weight.masked_fill(gone, 0)
            effect = effect_of(weight.float(), after.float())
            settled[name] = Settled(weight=after, tensors={name: after}, effect=effect)
        return settled

    def restore(self, name: str, written: Mapping[str, Tensor]) -> Tensor:
        return written[name]


class ActivationAware:
    """AWQ (arXiv 2306.00978): weights rounded to nearest after their columns were scaled; the layer before them is divided by the same factors."""

    by_group = False  # the layer before has run already when the inputs are known

    def __init__(self, options: Awq, schemes: Schemes, header: ModelHeader) -> None:
        self._options, self._schemes, self._folding = options, schemes, Folding(header)

    def watch(self, columns: int, device: torch.device) -> Gram:
        return Gram(columns, device)

    def settle(self, block: LiveBlock, inputs: Sequence[Inputs], device: torch.device) -> dict[str, Settled]:
        seen = {name: shared for shared in inputs for name in shared.names}
        places = self._folding.places(block, seen)
        if block.warnings and not places:
            raise NightpressError(
                ErrorCode.UNSUPPORTED_ARCHITECTURE,
                f"`awq` can scale nothing in this model: {'; '.join(block.warnings)}.",
                hint="Use `gptq`, which exchanges no factors.",
            )
        floats = {name: block[name].to(device).float() for name in seen}
        factors: dict[str, Tensor] = {}
        for place in places:
            takers = [self._taker(part, floats) for part in place.parts]
            found = search_scales(takers, block[place.targets[0]].dtype, share=place.share)
            del takers
            place.apply(found, block, floats)
            factors |= dict.fromkeys(place.targets, found)
        settled = {}
        for name in list(floats):
            weight = floats.pop(name)
            if name not in seen:
                settled[name] = settle_uncoded(name, weight, block[name].dtype)
                continue
            statistic, scheme = seen[name].statistic, scheme_of(self._schemes, name)
            assert isinstance(statistic, Gram)
            importance = statistic.matrix().diagonal() / factors.get(name, torch.ones((), device=device)).square()
            coded = round_weight(weight, scheme, block[name].dtype, ranges=self._options.ranges, importance=importance)
            settled[name] = settle_coded(name, scheme, coded, weight)
        return settled

    def restore(self, name: str, written: Mapping[str, Tensor]) -> Tensor:
        return from_tensors(name, scheme_of(self._schemes, name), written)

    def _taker(self, part: Part, floats: Mapping[str, Tensor]) -> Taker:
        assert isinstance(part.statistic, Gram)
        stacked = torch.cat([floats[name] for name in part.names])
        grid = grid_of(scheme_of(self._schemes, part.names[0]))
        return Taker(stacked, part.statistic.matrix(), grid, part.share)


def settle_uncoded(name: str, weight: Tensor, stored: torch.dtype) -> Settled:
    """A norm, a bias or a router that compensates for scaled inputs, as it is written."""
    value = weight.to(stored)
    return Settled(weight=value, tensors={name: value}, effect=None)


def _prune(sparsity: float, pattern: str) -> Prune:
    if pattern == "unstructured":
        return Prune(sparsity)
    kept, of = (int(part) for part in pattern.split(":"))
    return Prune(1 - kept / of, (kept, of))


def effect_of(before: Tensor, after: Tensor) -> Effect:
    return Effect(
        squared_error=float((before - after).square().sum(dtype=torch.float64)),
        squared_norm=float(before.square().sum(dtype=torch.float64)),
        zeros=int((after == 0).sum()),
    )
