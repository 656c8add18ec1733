"""Passes that use the calibration inputs of linear layers, block by block: GPTQ, AWQ, SparseGPT and Wanda."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.data.calibration import calibration_samples
from nightpress.core.compress.executors.blocks import (
    FinalTensor,
    Inputs,
    Statistic,
)
from nightpress.core.compress.executors.live_block import LiveBlock
from nightpress.core.compress.grids.stored import Coded, from_tensors, grid_of, round_weight
from nightpress.core.compress.model.checkpoint import read_shards
from nightpress.core.compress.passes.blockwise import (
    Schemes,
    effect_of,
    made_up,
    press,
    quantize,
    record,
    scheme_of,
    settle_coded,
)
from nightpress.core.compress.passes.folding import Folding, FoldTarget
from nightpress.core.compress.passes.quantize import OnGrid
from nightpress.core.compress.passes.registry import folder_pass
from nightpress.core.compress.passes.sensitivity import part_of, schemes_within_budget
from nightpress.core.compress.passes.zeros import with_storage
from nightpress.core.compress.solvers.awq import AwqLayer, search_scales
from nightpress.core.compress.solvers.gptq import round_obs
from nightpress.core.compress.solvers.gram import Gram
from nightpress.core.compress.solvers.obs import Prune, factorize, solve
from nightpress.core.compress.solvers.wanda import Power, wanda_mask
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.report import PassRecord
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.linears import module_of
from nightpress.core.recipes.passes import Awq, Gptq, SparseGpt, Wanda
from nightpress.core.recipes.passes.quantize import Budgeted, Rounding
from nightpress.core.recipes.schemes import Scheme


@folder_pass(Gptq)
def gptq(source: Path, target: Path, options: Gptq, context: PassContext) -> PassRecord:
    """Quantize with GPTQ, and prune at the same time if `sparsity` is set. `target` becomes a compressed-tensors `pack-quantized` model."""
    schemes, summary, context = chosen_schemes(source, options, context)
    method, tables = Quantized(options, schemes), rounded_tables(source, options)
    return quantize(source, target, method, schemes, options, context, summary, outside=tables)


@folder_pass(Awq)
def awq(source: Path, target: Path, options: Awq, context: PassContext) -> PassRecord:
    """Quantize with AWQ. `target` becomes a compressed-tensors `pack-quantized` model whose norms contain the scale factors."""
    schemes, summary, context = chosen_schemes(source, options, context)
    method = ActivationAware(options, schemes, context.header)
    tables = rounded_tables(source, options)
    return quantize(source, target, method, schemes, options, context, summary, outside=tables)


@folder_pass(SparseGpt)
def sparsegpt(source: Path, target: Path, options: SparseGpt, context: PassContext) -> PassRecord:
    """Prune with SparseGPT. `target` becomes a dense model of the same size."""
    start = time.monotonic()
    done = record(options, context, press(source, target, Sparse(options), options, context), start, {})
    return with_storage(done, source, target)


@folder_pass(Wanda)
def wanda(source: Path, target: Path, options: Wanda, context: PassContext) -> PassRecord:
    """Prune with Wanda. `target` becomes a dense model of the same size."""
    start = time.monotonic()
    done = record(options, context, press(source, target, WeightAndActivation(options), options, context), start, {})
    return with_storage(done, source, target)


def chosen_schemes(
    source: Path, options: Budgeted, context: PassContext
) -> tuple[Schemes, dict[str, Any], PassContext]:
    """Return each module's scheme, the fields for the record's summary, and the context for the pass itself.

    With a budget, the sensitivity sweep runs here and takes the first half of the pass's progress.
    """
    summary: dict[str, Any] = {"bits": options.bits, "group_size": options.group_size, "symmetric": options.symmetric}
    if options.budget is None:
        return options.scheme, summary, context
    schemes, found = schemes_within_budget(source, calibration_samples(source, context), options, context)
    rest = replace(context, progress=part_of(context, 0.5, 1.0))
    return schemes, summary | {"bits": None, "budget": options.budget} | found, rest


def rounded_tables(source: Path, options: Rounding) -> dict[str, OnGrid]:
    """Return the rewrite of each token embedding that the options round. Embeddings lie outside the blocks."""
    infos = [tensor.info for shard in read_shards(source) for tensor in shard.tensors]
    tables = [info for info in infos if options.takes_table(info)]
    return {table.name: OnGrid(table, options.scheme(module_of(table)), options.ranges) for table in tables}


class _GroupByGroup:
    """A method that finishes the weights of each group of layers alone. Layers of a group read the same input tensor."""

    by_group = True

    def settle(
        self, block: Mapping[str, Tensor], inputs: Sequence[Inputs], device: torch.device
    ) -> dict[str, FinalTensor]:
        settled: dict[str, FinalTensor] = {}
        for group in inputs:
            settled |= self._settle({name: block[name].to(device) for name in group.names}, group.statistic)
        return settled

    def _settle(self, weights: Mapping[str, Tensor], statistic: Statistic) -> dict[str, FinalTensor]:
        raise NotImplementedError


class Quantized(_GroupByGroup):
    """GPTQ: codes, scales and zero points by the Optimal-Brain-Surgeon solver, or by rounding to nearest in rows where that is better."""

    def __init__(self, options: Gptq, schemes: Schemes) -> None:
        self._options, self._schemes = options, schemes
        self._prune = None if options.sparsity is None else _prune(options.sparsity, options.pattern)

    def watch(self, columns: int, device: torch.device) -> Gram:
        return Gram(columns, device)

    def codes(self, weights: Mapping[str, Tensor], statistic: Statistic) -> dict[str, Coded]:
        """The codes of weights [out, in] that read the same inputs. statistic: the Gram matrix of these inputs."""
        assert isinstance(statistic, Gram)
        gram = statistic.matrix()
        factor = factorize(gram, damping=self._options.damping, by_power=self._options.order == "activation")
        # Rows are independent, so weights can be solved together. Unstructured pruning is an exception: its quota is for one weight.
        alone = self._prune is not None and self._prune.pattern is None
        together: dict[tuple[Scheme, str], list[str]] = {}
        for name in weights:
            together.setdefault((scheme_of(self._schemes, name), name if alone else ""), []).append(name)
        found: dict[str, Coded] = {}
        for (scheme, _), names in together.items():
            coded = round_obs(
                torch.cat([weights[name].float() for name in names]),
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
                found[name] = Coded(coded.codes[rows], coded.scale[rows], zero_point)
                start = rows.stop
        return found

    def _settle(self, weights: Mapping[str, Tensor], statistic: Statistic) -> dict[str, FinalTensor]:
        return {
            name: settle_coded(name, scheme_of(self._schemes, name), coded, weights[name].float())
            for name, coded in self.codes(weights, statistic).items()
        }

    def restore(self, name: str, written: Mapping[str, Tensor]) -> Tensor:
        return from_tensors(name, scheme_of(self._schemes, name), written)


class Sparse(_GroupByGroup):
    """SparseGPT: pruned weights are zero, and the remaining weights compensate for them."""

    def __init__(self, options: SparseGpt) -> None:
        self._damping, self._prune = options.damping, _prune(options.sparsity, options.pattern)

    def watch(self, columns: int, device: torch.device) -> Gram:
        return Gram(columns, device)

    def _settle(self, weights: Mapping[str, Tensor], statistic: Statistic) -> dict[str, FinalTensor]:
        assert isinstance(statistic, Gram)
        factor = factorize(statistic.matrix(), damping=self._damping)
        settled = {}
        # Rows are independent, so weights can be solved together. Unstructured pruning is an exception: its quota is for one weight.
        for names in [[name] for name in weights] if self._prune.pattern is None else [list(weights)]:
            before = torch.cat([weights[name].float() for name in names])
            after = solve(before, factor, prune=self._prune).weight
            counts = [len(weights[name]) for name in names]
            for name, was, now in zip(names, torch.split(before, counts), torch.split(after, counts), strict=True):
                value = now.to(weights[name].dtype, copy=True)
                settled[name] = FinalTensor(weight=value, tensors={name: value}, effect=effect_of(was, value.float()))
        return settled

    def restore(self, name: str, written: Mapping[str, Tensor]) -> Tensor:
        return written[name]


class WeightAndActivation(_GroupByGroup):
    """Wanda: weights under its mask are zero, and the others are unchanged."""

    def __init__(self, options: Wanda) -> None:
        self._prune = _prune(options.sparsity, options.pattern)

    def watch(self, columns: int, device: torch.device) -> Power:
        return Power(columns, device)

    def _settle(self, weights: Mapping[str, Tensor], statistic: Statistic) -> dict[str, FinalTensor]:
        assert isinstance(statistic, Power)
        settled = {}
        for name, weight in weights.items():
            gone = wanda_mask(weight, statistic.sum, self._prune.sparsity, self._prune.pattern)
            after = weight.masked_fill(gone, 0)
            effect = effect_of(weight.float(), after.float())
            settled[name] = FinalTensor(weight=after, tensors={name: after}, effect=effect)
        return settled

    def restore(self, name: str, written: Mapping[str, Tensor]) -> Tensor:
        return written[name]


class ActivationAware:
    """AWQ: scales the columns of each weight, divides the layer before it by the same factors, and rounds to nearest."""

    by_group = (
        False  # The layer before a weight changes too, and it has already run when the weight's inputs are known.
    )

    def __init__(self, options: Awq, schemes: Schemes, header: ModelHeader) -> None:
        self._options, self._schemes, self._folding = options, schemes, Folding(header)

    def watch(self, columns: int, device: torch.device) -> Gram:
        return Gram(columns, device)

    def settle(self, block: LiveBlock, inputs: Sequence[Inputs], device: torch.device) -> dict[str, FinalTensor]:
        seen = {name: group for group in inputs for name in group.names}
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
            layers = [self._layer(part, floats) for part in place.parts]
            found = search_scales(layers, block[place.targets[0]].dtype, share=place.share)
            del layers
            place.apply(found, block, floats)
            factors |= dict.fromkeys(place.targets, found)
        settled = {}
        for name in list(floats):
            weight = floats.pop(name)
            if name not in seen:
                settled[name] = made_up(name, weight, block[name].dtype)
                continue
            statistic, scheme = seen[name].statistic, scheme_of(self._schemes, name)
            assert isinstance(statistic, Gram)
            importance = statistic.matrix().diagonal() / factors.get(name, torch.ones((), device=device)).square()
            coded = round_weight(weight, scheme, block[name].dtype, ranges=self._options.ranges, importance=importance)
            settled[name] = settle_coded(name, scheme, coded, weight)
        return settled

    def restore(self, name: str, written: Mapping[str, Tensor]) -> Tensor:
        return from_tensors(name, scheme_of(self._schemes, name), written)

    def _layer(self, part: FoldTarget, floats: Mapping[str, Tensor]) -> AwqLayer:
        assert isinstance(part.statistic, Gram)
        stacked = torch.cat([floats[name] for name in part.names])
        grid = grid_of(scheme_of(self._schemes, part.names[0]))
        return AwqLayer(stacked, part.statistic.matrix(), grid, part.share)


def _prune(sparsity: float, pattern: str) -> Prune:
    if pattern == "unstructured":
        return Prune(sparsity)
    kept, of = (int(part) for part in pattern.split(":"))
    return Prune(1 - kept / of, (kept, of))
