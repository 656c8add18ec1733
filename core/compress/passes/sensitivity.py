"""Which bits each layer gets: every layer's output error under every candidate, measured in one sweep, and the best choice within a budget."""

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

_ERRORS = "_errors"  #: what is written for a weight: its relative squared output error under each candidate


def schemes_within_budget(
    source: Path, samples: Batch, options: Budgeted, context: PassContext
) -> tuple[Callable[[str], Scheme], dict[str, Any]]:
    """How each module is stored so that the sum of the layers' relative output errors is least, and what the record says of it.

    Layers that are given the same inputs get the same bits, since runtimes fuse them. What was chosen is kept in the job's work folder.
    """
    kept = context.work_dir / f"sensitivity-{context.index}.json"
    recipe = options.model_dump_json()
    found: dict[str, Any] = json.loads(kept.read_bytes()) if kept.exists() else {}
    if found.get("recipe") != recipe:
        # The sweep's own files go when it is done, so only what it found is a checkpoint.
        measuring = replace(context, checkpoint=lambda _path, _step: None, progress=part_of(context, 0.0, 0.5))
        found = {"recipe": recipe, **_measure(source, samples, options, measuring)}
        write_file(kept, json.dumps(found).encode())
        context.whole(0, kept)
    bits: dict[str, int] = found["bits"]
    return lambda module: options.candidate(bits[module]), {"bits_by_layer": bits, "error_by_layer": found["errors"]}


def part_of(context: PassContext, start: float, end: float) -> Callable[[float, str], None]:
    """Progress for a part of a pass."""
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
    """Leaves every weight as it is, and writes what each candidate would cost its outputs in the weight's place."""

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
    """Of each candidate, rounded to nearest: (W − Ŵ)H(W − Ŵ)ᵀ over WHWᵀ, traces both."""
    exact = weight.float()
    power = float(((exact @ gram) * exact).sum())
    errors = []
    for bits in options.candidates:
        scheme = options.candidate(bits)
        coded = round_weight(exact, scheme, weight.dtype, ranges=options.ranges, importance=gram.diagonal())
        lost = exact - dequantized(coded, scheme)
        errors.append(float(((lost @ gram) * lost).sum()) / power if power else 0.0)
    return errors
