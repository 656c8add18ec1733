"""Mixed precision: measures each layer's output error at each candidate bit width in one sweep, and chooses bits within a budget."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.executors.blocks import FinalTensor, Inputs, press_blocks
from nightpress.core.compress.executors.rewrite import Effect
from nightpress.core.compress.grids.stored import dequantized, round_weight
from nightpress.core.compress.model.checkpoint import read_shards, write_file
from nightpress.core.compress.model.skeleton import Batch
from nightpress.core.compress.model.source import SourceTensors
from nightpress.core.compress.solvers.gram import Gram
from nightpress.core.compress.solvers.knapsack import choose
from nightpress.core.recipes.linears import is_linear_weight, module_of
from nightpress.core.recipes.passes.quantize import Budgeted
from nightpress.core.recipes.schemes import Scheme

_ERRORS = "_errors"  #: suffix of the tensor that is written for a weight: its unit, then its relative squared output error per candidate


def schemes_within_budget(
    source: Path, samples: Batch, options: Budgeted, context: PassContext
) -> tuple[Callable[[str], Scheme], dict[str, Any]]:
    """Choose each module's scheme so that the sum of the layers' relative output errors is smallest within the budget.

    Returns (module → scheme, fields for the record's summary). Layers that share their inputs get the same bits, because runtimes fuse
    them. The choice is a checkpoint in the job's work folder.
    """
    kept = context.work_dir / f"sensitivity-{context.index}.json"
    recipe = options.model_dump_json()
    found: dict[str, Any] = json.loads(kept.read_bytes()) if kept.exists() else {}
    if found.get("recipe") != recipe:
        # The sweep deletes its files at its end, so only its result is a checkpoint.
        measuring = replace(context, checkpoint=lambda _path, _step: None, progress=part_of(context, 0.0, 0.5))
        found = {"recipe": recipe, **_measure(source, samples, options, measuring)}
        write_file(kept, json.dumps(found).encode())
        context.whole(0, kept)
    bits: dict[str, int] = found["bits"]
    return lambda module: options.candidate(bits[module]), {"bits_by_layer": bits, "error_by_layer": found["errors"]}


def part_of(context: PassContext, start: float, end: float) -> Callable[[float, str], None]:
    """Return a progress function for the part of a pass from `start` to `end`, both fractions of the pass."""
    return lambda fraction, message: context.progress(start + (end - start) * fraction, message)


def _measure(source: Path, samples: Batch, options: Budgeted, context: PassContext) -> dict[str, Any]:
    infos = {tensor.name: tensor.info for shard in read_shards(source) for tensor in shard.tensors}
    chosen = frozenset(info.name for info in infos.values() if is_linear_weight(info, options.ignore))
    scratch = context.work_dir / f"sensitivity-{context.index}"
    method = Sensitivity(options, source)
    recipe = "sensitivity " + options.model_dump_json()
    press_blocks(source, scratch, method, samples, context, chosen=chosen, recipe=recipe)
    written = SourceTensors(read_shards(scratch))
    errors = {name: written.read(name + _ERRORS).tolist() for name in infos if name + _ERRORS in written}
    units: dict[float, list[str]] = {}
    for name, (unit, *_) in errors.items():
        units.setdefault(unit, []).append(name)
    together = list(units.values())
    sizes = [
        [sum(options.candidate(bits).stored_bytes(infos[name]) for name in names) for bits in options.candidates]
        for names in together
    ]
    lost = [
        [sum(errors[name][1 + at] for name in names) for at in range(len(options.candidates))] for names in together
    ]
    picked = choose(sizes, lost, options.room(infos.values(), errors))
    shutil.rmtree(scratch)
    bits = {
        module_of(infos[name]): options.candidates[at]
        for names, at in zip(together, picked, strict=True)
        for name in names
    }
    by_layer = {
        module_of(infos[name]): dict(zip(map(str, options.candidates), errors[name][1:], strict=True))
        for name in errors
    }
    return {"bits": bits, "errors": by_layer}


class Sensitivity:
    """Changes no weight. In place of each weight, writes the output error that each candidate would cause."""

    by_group = True

    def __init__(self, options: Budgeted, source: Path) -> None:
        self._options, self._source = options, SourceTensors(read_shards(source))
        self._places = {name: place for place, name in enumerate(self._source.names())}

    def watch(self, columns: int, device: torch.device) -> Gram:
        return Gram(columns, device)

    def settle(
        self, block: Mapping[str, Tensor], inputs: Sequence[Inputs], device: torch.device
    ) -> dict[str, FinalTensor]:
        settled = {}
        for group in inputs:
            assert isinstance(group.statistic, Gram)
            gram = group.statistic.matrix()
            unit = min(self._places[name] for name in group.names)
            for name in group.names:
                errors = output_errors(block[name].to(device), gram, self._options)
                tensor = torch.tensor([unit, *errors], dtype=torch.float64)
                settled[name] = FinalTensor(weight=block[name], tensors={name + _ERRORS: tensor}, effect=Effect())
        return settled

    def restore(self, name: str, written: Mapping[str, Tensor]) -> Tensor:
        del written
        return self._source.read(name)


def output_errors(weight: Tensor, gram: Tensor, options: Budgeted) -> list[float]:
    """Return for each candidate, rounded to nearest, tr((W − Ŵ)H(W − Ŵ)ᵀ) / tr(WHWᵀ): the relative squared error of the layer's outputs.

    weight W [out, in]; gram H [in, in] float32 = Σ xxᵀ.
    """
    exact = weight.float()
    power = float(((exact @ gram) * exact).sum())
    errors = []
    for bits in options.candidates:
        scheme = options.candidate(bits)
        coded = round_weight(exact, scheme, weight.dtype, ranges=options.ranges, importance=gram.diagonal())
        lost = exact - dequantized(coded, scheme)
        errors.append(float(((lost @ gram) * lost).sum()) / power if power else 0.0)
    return errors
