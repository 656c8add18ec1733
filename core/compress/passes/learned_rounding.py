"""Learned rounding: each block's codes and ranges are learned by gradients of the error of the block's output."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.executors.blocks import FinalTensor, Inputs
from nightpress.core.compress.executors.live_block import Lessons, LiveBlock
from nightpress.core.compress.executors.reproducible import backward
from nightpress.core.compress.grids.rounded_inputs import round_inputs
from nightpress.core.compress.grids.stored import Coded, dequantized, from_tensors, round_weight
from nightpress.core.compress.passes.blockwise import (
    Schemes,
    input_scales,
    quantize,
    scheme_of,
    settle_coded,
    watch_inputs,
)
from nightpress.core.compress.passes.calibrated import Quantized, rounded_tables
from nightpress.core.compress.passes.quantize import shared_peak
from nightpress.core.compress.passes.registry import folder_pass
from nightpress.core.compress.passes.sensitivity import press_with_bits
from nightpress.core.compress.ranks.group import Group
from nightpress.core.compress.solvers.gram import Gram
from nightpress.core.compress.solvers.learned_rounding import LearnedWeight
from nightpress.core.handoff.report import PassRecord
from nightpress.core.recipes.passes import Gptq, LearnedRounding

_JUDGED = 8  #: every n-th batch of samples judges what the others taught
_JUDGEMENTS = 10  #: how often the present codes are judged while a block learns

SHARE = "output error, as a share of plain rounding's"

Codes = Mapping[str, Coded]  #: by weight


@folder_pass(LearnedRounding)
def learned_rounding(source: Path, target: Path, options: LearnedRounding, context: PassContext) -> PassRecord:
    """Quantize by learned rounding. `target` becomes a compressed-tensors model."""
    largest = shared_peak(source, options, context)

    def press(folder: Path, schemes: Schemes, summary: dict[str, Any], context: PassContext) -> PassRecord:
        method = Learned(options, schemes, largest, context.seed)
        told = summary | {"format": options.format, "activations": options.activations, "steps": options.steps}
        tables = rounded_tables(source, options)
        return quantize(source, folder, method, schemes, options, context, told, outside=tables, step=options.batch)

    return press_with_bits(source, target, options, context, press)


class Learned:
    """Learns the codes of all layers of a block together."""

    by_group = False

    def __init__(self, options: LearnedRounding, schemes: Schemes, largest: float | None, seed: int) -> None:
        """largest: as in `round_weight`."""
        self._options, self._schemes, self._largest, self._seed = options, schemes, largest, seed
        self._solver = None
        if options.start == "better":
            self._solver = Quantized(Gptq(symmetric=options.symmetric, ranges=options.ranges), schemes, largest)

    def watch(self, columns: int, device: torch.device) -> Gram:
        return watch_inputs(self._options, columns, device)

    def settle(self, block: LiveBlock, inputs: Sequence[Inputs], device: torch.device) -> dict[str, FinalTensor]:
        lessons = block.lessons
        assert lessons is not None
        weights = {name: block[name].to(device) for group in inputs for name in group.names}
        scales = input_scales(inputs)
        for name in weights:
            scheme = scheme_of(self._schemes, name)
            if scheme.activations is not None:
                lessons.round_inputs(name, partial(round_inputs, scheme=scheme, total=scales.get(name)))
        codes, share = self._learn(lessons, weights, self._starts(weights, inputs, block.group), block.group)
        block.figures[SHARE] = share
        return {
            name: settle_coded(
                name, scheme_of(self._schemes, name), coded, weights[name].float(), input_scale=scales.get(name)
            )
            for name, coded in codes.items()
        }

    def restore(self, name: str, written: Mapping[str, Tensor]) -> Tensor:
        return from_tensors(name, scheme_of(self._schemes, name), written)

    def _starts(self, weights: Mapping[str, Tensor], inputs: Sequence[Inputs], group: Group) -> list[Codes]:
        """The codes to start from: the nearest ones, and GPTQ's if they are asked for."""
        nearest: dict[str, Coded] = {}
        for seen in inputs:
            assert isinstance(seen.statistic, Gram)
            for name in seen.names:
                nearest[name] = round_weight(
                    weights[name].float(),
                    scheme_of(self._schemes, name),
                    weights[name].dtype,
                    ranges=self._options.ranges,
                    importance=seen.statistic.matrix().diagonal(),
                    largest=self._largest,
                )
        if self._solver is None:
            return [nearest]
        return [nearest, self._solver.codes(weights, inputs, next(iter(weights.values())).device, group)]

    def _learn(
        self, lessons: Lessons, weights: Mapping[str, Tensor], starts: Sequence[Codes], group: Group
    ) -> tuple[Codes, float]:
        """Learn from the best start. Returns the best codes that were judged, the starts' among them, and their error.

        The error is a share of the nearest codes' error, which are the first start. All processes of the group take the same steps: errors
        and gradients are sums over the samples of all.
        """
        taught, judged = split(lessons.batches)
        errors = [self._error(lessons, start, judged, group) for start in starts]
        least = min(errors)
        best = starts[errors.index(least)]
        learned = {
            name: LearnedWeight(weights[name].float(), coded, scheme_of(self._schemes, name))
            for name, coded in best.items()
        }
        steps = self._options.steps
        order = _endless(taught, self._seed)
        for step in range(steps):
            put = {name: lessons.put(name, weight.weight()) for name, weight in learned.items()}
            with torch.enable_grad():
                for _ in range(lessons.step_batches):
                    if (error := lessons.squared_error(next(order))) is not None:
                        backward(error)
            rate = (1 - step / steps) / steps
            for name, gradient in _gradients(put, group).items():
                learned[name].step(gradient, rate)
            del put
            if (step + 1) * _JUDGEMENTS // steps > step * _JUDGEMENTS // steps:
                now = {name: weight.coded() for name, weight in learned.items()}
                found = self._error(lessons, now, judged, group)
                if found < least:
                    best, least = now, found
                lessons.tell((step + 1) / steps)
        return best, least / errors[0] if errors[0] else 1.0

    def _error(self, lessons: Lessons, codes: Codes, batches: Sequence[int], group: Group) -> float:
        """The squared error of the block's output with these codes, summed over batches."""
        for name, coded in codes.items():
            lessons.put(name, dequantized(coded, scheme_of(self._schemes, name)))
        found = [error for batch in batches if (error := lessons.squared_error(batch)) is not None]
        return sum(group.collect(float(torch.stack(found).sum()) if found else 0.0))


def _gradients(put: Mapping[str, nn.Parameter], group: Group) -> dict[str, Tensor]:
    """The gradient of each weight, summed over the processes. An expert that got no token in any of them has none."""
    own = {name: parameter.grad for name, parameter in put.items() if parameter.grad is not None}
    if group.size == 1:
        return own
    known = set().union(*group.collect(set(own)))
    found = {}
    for name in [name for name in put if name in known]:
        found[name] = own[name].float() if name in own else torch.zeros_like(put[name], dtype=torch.float32)
        group.sum(found[name])
    return found


def split(batches: int) -> tuple[list[int], list[int]]:
    """Return the batches that teach and those that judge. All do both if there are few."""
    if batches < _JUDGED:
        return list(range(batches)), list(range(batches))
    judged = list(range(_JUDGED - 1, batches, _JUDGED))
    return [batch for batch in range(batches) if batch not in judged], judged


def _endless(batches: Sequence[int], seed: int) -> Iterator[int]:
    """Yield the batches in a random order, then in another."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for place in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[place]
