"""GPTQ onto the grids of GGUF's types. The model's folder holds each weight's blocks as llama.cpp reads them."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.executors.blocks import FinalTensor, Inputs
from nightpress.core.compress.executors.rewrite import Effect, Put
from nightpress.core.compress.grids.gguf_blocks import read_blocks
from nightpress.core.compress.grids.gguf_ranges import round_to_blocks
from nightpress.core.compress.grids.workspace import Workspace
from nightpress.core.compress.model.checkpoint import read_shards, tensor_info
from nightpress.core.compress.passes.blockwise import effect_of, press, record
from nightpress.core.compress.passes.registry import folder_pass
from nightpress.core.compress.passes.sensitivity import measure_errors, relative_errors
from nightpress.core.compress.solvers.ggml import GgmlQuantizer
from nightpress.core.compress.solvers.gguf_codes import solve_blocks
from nightpress.core.compress.solvers.gram import Gram
from nightpress.core.compress.solvers.knapsack import choose
from nightpress.core.compress.solvers.obs import factorize
from nightpress.core.handoff.report import PassRecord
from nightpress.core.recipes.gguf_types import GgufType, blocks_name, gguf_type
from nightpress.core.recipes.header import TensorInfo
from nightpress.core.recipes.passes.k_quants import KQuants

_ROWS = 128  #: of a weight, at most, on which the errors of its candidates are measured


@folder_pass(KQuants)
def k_quants(source: Path, target: Path, options: KQuants, context: PassContext) -> PassRecord:
    """Round linear weights onto the grids of GGUF's types. `target` becomes a folder that only the export `gguf` reads."""
    start = time.monotonic()
    infos = {tensor.name: tensor.info for shard in read_shards(source) for tensor in shard.tensors}
    linear = {name: info for name, info in infos.items() if options.takes_linear(info)}
    tables = {
        name: InBlocks(info, options.type_of(info, options.table))
        for name, info in infos.items()
        if options.takes_table(info)
    }
    rest, told = context, {}
    with GgmlQuantizer(context.threads) as ggml:
        if options.bits_per_weight is None:
            types = {name: options.type_of(info, options.type) for name, info in linear.items()}
        else:
            room, rest = options.room(infos.values()), context.part(0.5, 1.0)
            types, errors = _chosen(source, linear, room, options, ggml, context.part(0.0, 0.5))
            names = {_module(name): kind.name for name, kind in types.items()}
            told = {"type_by_layer": names, "error_by_layer": errors}
        done = press(source, target, OnBlocks(types, options.damping, ggml), options, rest, outside=tables)
    rounded = [infos[name] for name in done.effects]
    summary: dict[str, Any] = {
        "type": options.type if options.bits_per_weight is None else None,
        "table": options.table,
        "bits_per_weight": 8
        * sum(done.bytes_after[info.name] for info in rounded)
        / max(1, sum(info.shape[0] * info.shape[1] for info in rounded)),
    }
    return record(options, context, done, start, summary | told)


def _module(weight: str) -> str:
    return weight.removesuffix(".weight")


def _chosen(
    source: Path,
    linear: Mapping[str, TensorInfo],
    room: int,
    options: KQuants,
    ggml: GgmlQuantizer,
    context: PassContext,
) -> tuple[dict[str, GgufType], dict[str, dict[str, float]]]:
    """Choose each weight's type by its measured errors → the types, and for the record each layer's error by candidate."""
    errors_of = partial(type_errors, candidates=options.candidates, ggml=ggml)
    recipe = options.model_dump_json(include={"pass_", "candidates", "ignore"})
    _, errors = measure_errors(source, frozenset(linear), errors_of, recipe, context)
    sizes = [[options.size_of(linear[name], kind) for kind in options.candidates] for name in errors]
    picked = choose(sizes, list(errors.values()), room)
    names = {name: options.candidates[at] for name, at in zip(errors, picked, strict=True)}
    told = {_module(name): dict(zip(map(str, options.candidates), lost, strict=True)) for name, lost in errors.items()}
    # A weight that no calibration text reached has no errors.
    return {name: options.type_of(info, names.get(name, options.candidates[0])) for name, info in linear.items()}, told


def type_errors(weight: Tensor, gram: Tensor, candidates: Sequence[str], ggml: GgmlQuantizer) -> list[float]:
    """The relative squared output error of a weight [out, in], rounded to nearest, for each type, on some of its rows. gram [in, in]."""
    exact, importance = weight[:: -(-len(weight) // _ROWS)].float(), gram.diagonal()

    def rounded(kind: GgufType) -> Tensor:
        if kind.even:
            return round_to_blocks(exact, kind, importance).dequantize()
        return _decoded(ggml.blocks(exact, kind, importance), kind).to(weight.device)

    kinds = (gguf_type(name, weight.shape[1]) for name in candidates)
    return relative_errors(exact, gram, (rounded(kind) for kind in kinds if kind is not None))


def _decoded(blocks: Tensor, kind: GgufType) -> Tensor:
    """Blocks, uint8 [out, bytes of a row] → float32 [out, in] on the processor."""
    return torch.from_numpy(read_blocks(blocks.cpu().numpy(), kind))


class OnBlocks:
    """The method: codes on each weight's grid by the Optimal-Brain-Surgeon solver, or by ggml where the grid is uneven."""

    by_group = True

    def __init__(self, types: Mapping[str, GgufType], damping: float, ggml: GgmlQuantizer) -> None:
        self._types, self._damping, self._ggml = types, damping, ggml

    def watch(self, columns: int, device: torch.device) -> Gram:
        return Gram(columns, device)

    def settle(
        self, block: Mapping[str, Tensor], inputs: Sequence[Inputs], device: torch.device
    ) -> dict[str, FinalTensor]:
        settled: dict[str, FinalTensor] = {}
        for group in inputs:
            assert isinstance(group.statistic, Gram)
            gram = group.statistic.matrix()
            even = any(self._types[name].even for name in group.names)
            factor = factorize(gram, damping=self._damping, by_power=True) if even else None
            for name in group.names:
                kind, weight = self._types[name], block[name].to(device).float()
                if factor is not None and kind.even:
                    coded = solve_blocks(weight, gram, factor, kind)
                    blocks, after = coded.to_bytes(), coded.dequantize()
                else:
                    blocks = self._ggml.blocks(weight, kind, gram.diagonal())
                    after = _decoded(blocks, kind).to(device)
                settled[name] = FinalTensor(
                    weight=after, tensors={blocks_name(name, kind): blocks}, effect=effect_of(weight, after)
                )
        return settled

    def restore(self, name: str, written: Mapping[str, Tensor]) -> Tensor:
        kind = self._types[name]
        return _decoded(written[blocks_name(name, kind)], kind)


@dataclass(frozen=True)
class InBlocks:
    """Rewrites a table [out, in] as its blocks, rounded to nearest, a chunk of rows at a time."""

    info: TensorInfo
    kind: GgufType

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        rows, columns = self.info.shape
        return (tensor_info(blocks_name(self.info.name, self.kind), "U8", (rows, self.kind.row_bytes(columns))),)

    @property
    def row_step(self) -> int:
        return 1

    def __call__(self, rows: Tensor, first_row: int, put: Put, workspace: Workspace) -> Effect:
        del workspace
        weight = rows.float()
        coded = round_to_blocks(weight, self.kind)
        put(self.outputs[0].name, first_row * self.outputs[0].shape[1], coded.to_bytes())
        return Effect(float((weight - coded.dequantize()).square().sum()), float(weight.square().sum()))
