"""Passes that use the calibration inputs of linear layers, block by block: GPTQ, AWQ, SparseGPT and Wanda."""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.executors.blocks import FinalTensor, Inputs
from nightpress.core.compress.executors.live_block import LiveBlock, group_of
from nightpress.core.compress.grids.stored import Coded, from_tensors, grid_of, round_weight
from nightpress.core.compress.model.checkpoint import read_shards
from nightpress.core.compress.passes.blockwise import (
    Schemes,
    effects_of,
    input_scales,
    join_coded,
    made_up,
    press,
    quantize,
    record,
    scheme_of,
    settle_all_coded,
    watch_inputs,
)
from nightpress.core.compress.passes.folding import BlockFold, Folding, FoldTarget
from nightpress.core.compress.passes.quantize import OnGrid, shared_peak
from nightpress.core.compress.passes.registry import folder_pass
from nightpress.core.compress.passes.sensitivity import press_with_bits
from nightpress.core.compress.passes.stacks import Stack, factored, share_rows, sharing, stacks
from nightpress.core.compress.passes.zeros import with_storage
from nightpress.core.compress.ranks.group import Group
from nightpress.core.compress.solvers.awq import AwqLayer, search_scales
from nightpress.core.compress.solvers.gptq import round_obs
from nightpress.core.compress.solvers.gram import Gram
from nightpress.core.compress.solvers.obs import Factor, Prune, solve
from nightpress.core.compress.solvers.wanda import Power, wanda_mask
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.report import PassRecord
from nightpress.core.recipes.block_peak import stack_size
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.linears import module_of
from nightpress.core.recipes.passes import Awq, Gptq, SparseGpt, Wanda
from nightpress.core.recipes.passes.quantize import Rounding
from nightpress.core.recipes.schemes import Scheme


@folder_pass(Gptq)
def gptq(source: Path, target: Path, options: Gptq, context: PassContext) -> PassRecord:
    """Quantize with GPTQ, and prune at the same time if `sparsity` is set. `target` becomes a compressed-tensors `pack-quantized` model."""

    largest = shared_peak(source, options, context)

    def press(folder: Path, schemes: Schemes, summary: dict[str, Any], context: PassContext) -> PassRecord:
        method, tables = Quantized(options, schemes, largest), rounded_tables(source, options)
        told = summary | {"format": options.format, "activations": options.activations}
        return quantize(source, folder, method, schemes, options, context, told, outside=tables)

    return press_with_bits(source, target, options, context, press)


@folder_pass(Awq)
def awq(source: Path, target: Path, options: Awq, context: PassContext) -> PassRecord:
    """Quantize with AWQ. `target` becomes a compressed-tensors `pack-quantized` model whose norms contain the scale factors."""

    def press(folder: Path, schemes: Schemes, summary: dict[str, Any], context: PassContext) -> PassRecord:
        method = ActivationAware(options, schemes, context.header)
        tables = rounded_tables(source, options)
        return quantize(source, folder, method, schemes, options, context, summary, outside=tables)

    return press_with_bits(source, target, options, context, press)


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


def rounded_tables(source: Path, options: Rounding) -> dict[str, OnGrid]:
    """Return the rewrite of each token embedding that the options round. Embeddings lie outside the blocks."""
    infos = [tensor.info for shard in read_shards(source) for tensor in shard.tensors]
    tables = [info for info in infos if options.takes_table(info)]
    return {table.name: OnGrid(table, options.scheme(module_of(table)), options.ranges) for table in tables}


class Quantized:
    """GPTQ: codes, scales and zero points by the Optimal-Brain-Surgeon solver, or by rounding to nearest in rows where that is better."""

    by_group = True

    def __init__(self, options: Gptq, schemes: Schemes, largest: float | None = None) -> None:
        """largest: as in `round_weight`."""
        self._options, self._schemes, self._largest = options, schemes, largest
        self._prune = None if options.sparsity is None else _prune(options.sparsity, options.pattern)

    def watch(self, columns: int, device: torch.device) -> Gram:
        return watch_inputs(self._options, columns, device)

    def settle(
        self, block: Mapping[str, Tensor], inputs: Sequence[Inputs], device: torch.device
    ) -> dict[str, FinalTensor]:
        settled: dict[str, FinalTensor] = {}
        scales = input_scales(inputs)
        for scheme, solved, group in self._solve(block, inputs, device, group_of(block)):
            rows = {name: len(block[name]) for name in solved}
            settled |= settle_all_coded(solved, scheme, input_scales=scales, rows=rows, group=group)
        return settled

    def codes(
        self, block: Mapping[str, Tensor], inputs: Sequence[Inputs], device: torch.device, group: Group
    ) -> dict[str, Coded]:
        """The codes of the weights [out, in] that read these inputs."""
        return {
            name: join_coded(coded, len(block[name]), ranks)
            for _, solved, ranks in self._solve(block, inputs, device, group)
            for name, (coded, _) in solved.items()
        }

    def _solve(
        self, block: Mapping[str, Tensor], inputs: Sequence[Inputs], device: torch.device, group: Group
    ) -> Iterator[tuple[Scheme, dict[str, tuple[Coded, Tensor]], Group]]:
        """Yield weights of one scheme: name → (coded weight, weight before rounding in float32), and the processes that have their rows."""
        found = stacks(block, inputs, device, lambda name: scheme_of(self._schemes, name))
        by_power = self._options.order == "activation"
        for stack, gram, factor in factored(found, device, group, damping=self._options.damping, by_power=by_power):
            for places in self._together(stack.names):
                scheme = scheme_of(self._schemes, stack.names[places[0]])
                ranks = stack.sharing(block, places, group, free=_rows_are_free(self._prune))
                before = stack.weights(block, places, device, ranks)
                coded = self._round(before, gram, factor, scheme, block[stack.names[places[0]]].dtype, ranks)
                yield scheme, _of_each(coded, before, stack, block, places, ranks), ranks

    def _together(self, names: Sequence[str]) -> list[list[int]]:
        """The places of the weights of a group that are solved together: free rows need only the same scheme."""
        if not _rows_are_free(self._prune):
            return [[at] for at in range(len(names))]
        places: dict[Scheme, list[int]] = {}
        for at, name in enumerate(names):
            places.setdefault(scheme_of(self._schemes, name), []).append(at)
        return list(places.values())

    def _round(
        self, weights: Tensor, gram: Tensor, factor: Factor, scheme: Scheme, stored: torch.dtype, group: Group
    ) -> Coded:
        return round_obs(
            weights,
            gram,
            factor,
            scheme,
            stored,
            ranges=self._options.ranges,
            refine=self._options.refine,
            prune=self._prune,
            largest=self._largest,
            group=group,
        )

    def restore(self, name: str, written: Mapping[str, Tensor]) -> Tensor:
        return from_tensors(name, scheme_of(self._schemes, name), written)


class Sparse:
    """SparseGPT: pruned weights are zero, and the remaining weights compensate for them."""

    by_group = True

    def __init__(self, options: SparseGpt) -> None:
        self._damping, self._prune = options.damping, _prune(options.sparsity, options.pattern)

    def watch(self, columns: int, device: torch.device) -> Gram:
        return Gram(columns, device)

    def settle(
        self, block: Mapping[str, Tensor], inputs: Sequence[Inputs], device: torch.device
    ) -> dict[str, FinalTensor]:
        settled: dict[str, FinalTensor] = {}
        found, free = stacks(block, inputs, device, lambda _name: None), _rows_are_free(self._prune)
        for stack, _, factor in factored(found, device, group_of(block), damping=self._damping, by_power=False):
            each = range(len(stack.names))
            for places in [list(each)] if free else [[at] for at in each]:
                group = stack.sharing(block, places, group_of(block), free=free)
                stacked = stack.weights(block, places, device, group)
                before = stack.each(stacked, block, places, group)
                solved = solve(stacked, factor, prune=self._prune, group=group).weight
                after = stack.each(solved, block, places, group)
                values = {name: weight.to(block[name].dtype, copy=True) for name, weight in after.items()}
                effects = effects_of([(before[name], values[name].float()) for name in values], group)
                for (name, rows), effect in zip(values.items(), effects, strict=True):
                    value = group.join_rows(rows, len(block[name]))
                    settled[name] = FinalTensor(value, {name: value}, effect, joined=group.size > 1)
        return settled

    def restore(self, name: str, written: Mapping[str, Tensor]) -> Tensor:
        return written[name]


class WeightAndActivation:
    """Wanda: weights under its mask are zero, and the others are unchanged."""

    by_group = True

    def __init__(self, options: Wanda) -> None:
        self._prune = _prune(options.sparsity, options.pattern)

    def watch(self, columns: int, device: torch.device) -> Power:
        return Power(columns, device)

    def settle(
        self, block: Mapping[str, Tensor], inputs: Sequence[Inputs], device: torch.device
    ) -> dict[str, FinalTensor]:
        settled = {}
        for group in inputs:
            assert isinstance(group.statistic, Power)
            for name in group.names:
                ranks = sharing([block[name]], group_of(block))
                before = share_rows(block[name], ranks).to(device)
                mask = wanda_mask(before, group.statistic.sum, self._prune.sparsity, self._prune.pattern)
                rows = before.masked_fill(mask, 0)
                effect = effects_of([(before.float(), rows.float())], ranks)[0]
                after = ranks.join_rows(rows, len(block[name]))
                settled[name] = FinalTensor(after, {name: after}, effect, joined=ranks.size > 1)
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
        for alike in self._side_by_side(places, block):
            first = alike[0]
            spans = first.spans(block)
            layers = [
                [self._layer(part, floats) for part in (place.parts_of(block) if spans else place.parts)]
                for place in alike
            ]
            stored = block[first.targets[0]].dtype
            if spans:
                searched = search_scales(layers, stored, share=first.share, holders=block.group)
            else:
                group = group_of(block, first.targets[0])
                searched = search_scales(layers, stored, share=first.share, group=group)
            del layers
            for place, found in zip(alike, searched, strict=True):
                place.apply(found, block, floats)
                factors |= dict.fromkeys(place.targets, found)
        settled = {name: made_up(name, floats[name], block[name].dtype) for name in floats if name not in seen}
        for name in seen:
            group = sharing([block[name]], group_of(block, name))
            weight = share_rows(floats.pop(name), group)
            statistic, scheme = seen[name].statistic, scheme_of(self._schemes, name)
            assert isinstance(statistic, Gram)
            importance = statistic.matrix().diagonal() / factors.get(name, torch.ones((), device=device)).square()
            coded = round_weight(weight, scheme, block[name].dtype, ranges=self._options.ranges, importance=importance)
            rows = {name: len(block[name])}
            settled |= settle_all_coded({name: (coded, weight)}, scheme, input_scales={}, rows=rows, group=group)
        return settled

    def restore(self, name: str, written: Mapping[str, Tensor]) -> Tensor:
        return from_tensors(name, scheme_of(self._schemes, name), written)

    def _side_by_side(self, places: Sequence[BlockFold], block: LiveBlock) -> list[list[BlockFold]]:
        """Group places that follow each other and can be searched at once: equal shapes and schemes, and no tensor in common.

        The down projections of a mixture's experts are such places. All other places are alone.
        """
        groups: list[list[BlockFold]] = []
        taken: set[str] = set()
        before: object = None
        for place in places:
            own = {place.source, place.bias, *place.targets, *place.routers}
            kinds = [(tuple(block[name].shape), scheme_of(self._schemes, name)) for name in place.targets]
            like = (kinds, place.share, place.kind) if len(place.parts) == 1 and not place.spans(block) else None
            columns = block[place.targets[0]].shape[1]
            most = stack_size(sum(len(block[name]) for name in place.targets), columns, len(places))
            if like is None or like != before or own & taken or len(groups[-1]) >= most:
                groups.append([])
                taken = set()
            groups[-1].append(place)
            taken |= own
            before = like
        return groups

    def _layer(self, part: FoldTarget, floats: Mapping[str, Tensor]) -> AwqLayer:
        assert isinstance(part.statistic, Gram)
        stacked = torch.cat([floats[name] for name in part.names])
        grid = grid_of(scheme_of(self._schemes, part.names[0]))
        return AwqLayer(stacked, part.statistic.matrix(), grid, part.share)


def _of_each(
    coded: Coded, before: Tensor, stack: Stack, block: Mapping[str, Tensor], places: Sequence[int], group: Group
) -> dict[str, tuple[Coded, Tensor]]:
    """Name → this process's rows of its coded weight, and of the weight before, which were computed for the stack."""
    weights, codes, scales = (stack.each(part, block, places, group) for part in (before, coded.codes, coded.scale))
    zero_points = {} if coded.zero_point is None else stack.each(coded.zero_point, block, places, group)
    return {
        name: (Coded(codes[name], scales[name], zero_points.get(name), coded.global_scale), weights[name])
        for name in codes
    }


def _rows_are_free(prune: Prune | None) -> bool:
    """Whether rows don't depend on each other, so that weights can be solved together, and rows apart.

    Unstructured pruning is the exception: its quota is for all rows of one weight.
    """
    return prune is None or prune.pattern is not None


def _prune(sparsity: float, pattern: str) -> Prune:
    if pattern == "unstructured":
        return Prune(sparsity)
    kept, of = (int(part) for part in pattern.split(":"))
    return Prune(1 - kept / of, (kept, of))
