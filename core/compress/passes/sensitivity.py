"""Mixed precision: measures each layer's output error at each candidate bit width in one sweep, and chooses bits within a budget or a gate."""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nightpress.core.compress.calibration.samples import calibration_samples
from nightpress.core.compress.context import PassContext
from nightpress.core.compress.executors.blocks import FinalTensor, Inputs, press_blocks
from nightpress.core.compress.executors.live_block import group_of
from nightpress.core.compress.executors.rewrite import Effect
from nightpress.core.compress.grids.stored import dequantized, round_weight
from nightpress.core.compress.model.checkpoint import read_shards, write_file
from nightpress.core.compress.model.source import SourceTensors
from nightpress.core.compress.passes.blockwise import Schemes
from nightpress.core.compress.passes.within import Search, smallest_model
from nightpress.core.compress.ranks.group import Group
from nightpress.core.compress.solvers.gram import Gram
from nightpress.core.compress.solvers.knapsack import choose
from nightpress.core.compress.solvers.upgrades import upgrades
from nightpress.core.handoff.report import PassRecord
from nightpress.core.recipes.linears import is_linear_weight
from nightpress.core.recipes.passes.quantize import Budgeted
from nightpress.core.recipes.schemes import Scheme

_ERRORS = "_errors"  #: suffix of the tensor that is written for a weight: its unit, then its relative squared output error per candidate


@dataclass(frozen=True)
class Sweep:
    """The errors of all layers. Layers that share their inputs are a unit and get the same bits, because runtimes fuse them."""

    units: list[list[str]]  #: names of weights
    sizes: list[list[int]]  #: bytes of each unit, by candidate
    errors: dict[str, list[float]]  #: weight → its relative squared output error, by candidate
    room: int | None  #: bytes that the budget leaves for these weights; None: there is no budget

    @property
    def lost(self) -> list[list[float]]:
        """The sum of the errors of each unit's weights, by candidate."""
        return [[sum(each) for each in zip(*(self.errors[name] for name in unit), strict=True)] for unit in self.units]


#: (weight [out, in], Gram matrix [in, in] float32 of its inputs) → its relative squared output error, by candidate
ErrorsOf = Callable[[Tensor, Tensor], list[float]]
#: (folder to write, module → its scheme, fields for the record's summary, context) → the record
Press = Callable[[Path, Schemes, dict[str, Any], PassContext], PassRecord]


def press_with_bits(source: Path, target: Path, options: Budgeted, context: PassContext, press: Press) -> PassRecord:
    """Press a model with the options' bits, or with bits that are chosen for each layer by its error.

    The errors are measured in one sweep, which is a checkpoint in the job's work folder. Within a budget, the sum of the relative output
    errors is smallest. Within a gate, layers get more bits in the order of what these gain for their bytes, until the gate is kept.
    """
    summary: dict[str, Any] = {"bits": options.bits, "group_size": options.group_size, "symmetric": options.symmetric}
    if not options.chooses_bits:
        return press(target, options.scheme, summary, context)
    runs = 1 + max(1, options.tries(context.header))
    found = _sweep(source, options, context.part(0.0, 1 / runs))
    rest = context.part(1 / runs, 1.0)
    summary |= {
        "bits": None,
        "error_by_layer": {
            _module(name): dict(zip(map(str, options.candidates), errors, strict=True))
            for name, errors in found.errors.items()
        },
    }

    def with_options(picked: Sequence[int], folder: Path, context: PassContext) -> PassRecord:
        bits = {
            _module(name): options.candidates[at] for unit, at in zip(found.units, picked, strict=True) for name in unit
        }
        told = {"bits_by_layer": bits} | ({} if options.budget is None else {"budget": options.budget})
        return press(folder, ChosenBits(options, bits), summary | told, context)

    if options.within is None:
        assert found.room is not None
        return with_options(choose(found.sizes, found.lost, found.room), target, rest)
    line = _line(found)
    steps = [_told(picked, found, options) for picked in line]
    search = Search(options, steps, rest, context.work_dir / f"within-{context.index}.json")
    return smallest_model(search, target, lambda at, folder, context: with_options(line[at], folder, context), first=0)


@dataclass(frozen=True)
class ChosenBits:
    """The scheme of each module with the bits that were chosen for it."""

    options: Budgeted
    bits: Mapping[str, int]  #: by module

    def __call__(self, module: str) -> Scheme:
        return self.options.candidate(self.bits[module])


def _line(found: Sweep) -> list[list[int]]:
    """The candidates of all units after each upgrade, from the smallest ones."""
    now = [sizes.index(min(sizes)) for sizes in found.sizes]
    line = [list(now)]
    for unit, option in upgrades(found.sizes, found.lost):
        now[unit] = option
        line.append(list(now))
    return line


def _told(picked: Sequence[int], found: Sweep, options: Budgeted) -> str:
    """E.g. `int4 in 20 layers, int8 in 4`."""
    counts = Counter(options.candidates[at] for unit, at in zip(found.units, picked, strict=True) for _ in unit)
    parts = [f"int{bits} in {count}" for bits, count in sorted(counts.items())]
    return ", ".join(parts) + " layers"


def _module(weight: str) -> str:
    return weight.removesuffix(".weight")


def _sweep(source: Path, options: Budgeted, context: PassContext) -> Sweep:
    infos = {tensor.name: tensor.info for shard in read_shards(source) for tensor in shard.tensors}
    chosen = frozenset(info.name for info in infos.values() if is_linear_weight(info, options.ignore))
    errors_of = partial(output_errors, options=options)
    units, errors = measure_errors(source, chosen, errors_of, options.model_dump_json(), context)
    sizes = [
        [sum(options.candidate(bits).stored_bytes(infos[name]) for name in names) for bits in options.candidates]
        for names in units
    ]
    room = None if options.budget is None else options.room(infos.values(), errors)
    return Sweep(units, sizes, errors, room)


def measure_errors(
    source: Path, chosen: frozenset[str], errors_of: ErrorsOf, recipe: str, context: PassContext
) -> tuple[list[list[str]], dict[str, list[float]]]:
    """Measure the errors of the chosen weights in one sweep → the units of weights with the same inputs, and each weight's errors.

    The result is a checkpoint in the job's work folder. recipe: the options that decide the errors.
    """
    kept = context.work_dir / f"sensitivity-{context.index}.json"
    known: dict[str, Any] = json.loads(kept.read_bytes()) if kept.exists() else {}
    if known.get("recipe") != recipe:
        # The sweep deletes its files at its end, so only its result is a checkpoint.
        quiet = replace(context, checkpoint=lambda _path, _step: None)
        units, errors = _measure(source, chosen, errors_of, recipe, quiet)
        known = {"recipe": recipe, "units": units, "errors": errors}
        write_file(kept, json.dumps(known).encode())
        context.whole(0, kept)
    return known["units"], known["errors"]


def _measure(
    source: Path, chosen: frozenset[str], errors_of: ErrorsOf, recipe: str, context: PassContext
) -> tuple[list[list[str]], dict[str, list[float]]]:
    scratch = context.work_dir / f"sensitivity-{context.index}"
    method = Sensitivity(errors_of, source)
    samples = calibration_samples(source, context)
    press_blocks(source, scratch, method, samples, context, chosen=chosen, recipe=f"sensitivity {recipe}")
    written = SourceTensors.in_folder(scratch)
    names = (tensor.name for shard in read_shards(source) for tensor in shard.tensors)
    found = {name: written.read(name + _ERRORS).tolist() for name in names if name + _ERRORS in written}
    shutil.rmtree(scratch)
    units: dict[float, list[str]] = {}
    for name, (unit, *_) in found.items():
        units.setdefault(unit, []).append(name)
    return list(units.values()), {name: errors for name, (_, *errors) in found.items()}


class Sensitivity:
    """Changes no weight. In place of each weight, writes the output error that each candidate would cause."""

    by_group = True

    def __init__(self, errors_of: ErrorsOf, source: Path) -> None:
        self._errors_of, self._source = errors_of, SourceTensors.in_folder(source)
        self._places = {name: place for place, name in enumerate(self._source.names())}

    def watch(self, columns: int, device: torch.device) -> Gram:
        return Gram(columns, device)

    def settle(
        self, block: Mapping[str, Tensor], inputs: Sequence[Inputs], device: torch.device
    ) -> dict[str, FinalTensor]:
        seen = {name: group for group in inputs for name in group.names}
        errors = self._errors(block, seen, device, group_of(block))
        settled = {}
        for name, group in seen.items():
            unit = min(self._places[other] for other in group.names)
            tensor = torch.tensor([unit, *errors[name]], dtype=torch.float64)
            settled[name] = FinalTensor(block[name], {name + _ERRORS: tensor}, Effect(), joined=True)
        return settled

    def _errors(
        self, block: Mapping[str, Tensor], seen: Mapping[str, Inputs], device: torch.device, group: Group
    ) -> dict[str, list[float]]:
        """The errors of each weight. Each process of the group measures some of the weights."""
        names = list(seen)
        costs = [block[name].numel() * block[name].shape[1] for name in names]
        found = {}
        for name in (names[at] for at in group.portion(costs)[group.rank]):
            statistic = seen[name].statistic
            assert isinstance(statistic, Gram)
            found[name] = self._errors_of(block[name].to(device), statistic.matrix())
        return {name: errors for part in group.collect(found) for name, errors in part.items()}

    def restore(self, name: str, written: Mapping[str, Tensor]) -> Tensor:
        del written
        return self._source.read(name)


def output_errors(weight: Tensor, gram: Tensor, options: Budgeted) -> list[float]:
    """Return for each candidate, rounded to nearest, tr((W − Ŵ)H(W − Ŵ)ᵀ) / tr(WHWᵀ): the relative squared error of the layer's outputs.

    weight W [out, in]; gram H [in, in] float32 = Σ xxᵀ.
    """
    exact = weight.float()
    schemes = [options.candidate(bits) for bits in options.candidates]
    coded = (
        (round_weight(exact, scheme, weight.dtype, ranges=options.ranges, importance=gram.diagonal()), scheme)
        for scheme in schemes
    )
    return relative_errors(exact, gram, (dequantized(*pair) for pair in coded))


def relative_errors(weight: Tensor, gram: Tensor, rounded: Iterable[Tensor]) -> list[float]:
    """Return tr((W − Ŵ)H(W − Ŵ)ᵀ) / tr(WHWᵀ) for each rounded weight Ŵ. All float32: W, Ŵ [out, in]; gram H [in, in] = Σ xxᵀ."""
    power = float(((weight @ gram) * weight).sum())
    lost = (weight - other for other in rounded)
    return [float(((error @ gram) * error).sum()) / power if power else 0.0 for error in lost]
