"""Quantization passes."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from core.compress.checkpoint import tensor_info
from core.compress.context import PassContext
from core.compress.executors.rewrite import Effect, Put
from core.compress.executors.stream import copy_companions, sweep
from core.compress.export.compressed_tensors import write_config
from core.compress.solvers.grid import Grid, Workspace, pack, pack_zero_points, round_to_grid
from core.handoff.report import LayerEffect, PassRecord
from core.recipes.header import TensorInfo
from core.recipes.linears import is_linear_weight
from core.recipes.passes import WeightOnly

#: Errors are exact in layers of up to this many weights. In larger ones they are taken from every 8th row, which is hundreds of
#: thousands of weights still: measuring all of them would take a third of the time of rounding them.
_EXACT_WEIGHTS = 1024**2
_SAMPLE_EVERY = 8


def weight_only(source: Path, target: Path, options: WeightOnly, context: PassContext) -> PassRecord:
    """Round every linear weight to the nearest step of its grid. `target` becomes a compressed-tensors `pack-quantized` model."""
    start = time.monotonic()
    grid = Grid(options.bits, options.group_size, options.symmetric)

    def choose(info: TensorInfo) -> "PackQuantized | None":
        return PackQuantized(info, grid) if is_linear_weight(info, options.ignore) else None

    swept = sweep(source, target, choose, context, recipe=options.model_dump_json())
    copy_companions(source, target)
    modules = [name.removesuffix(".weight") for name in swept.effects]
    others = [
        name.removesuffix(".weight")
        for name, outputs in swept.outputs.items()
        if name not in swept.effects and name.endswith(".weight") and len(outputs[0].shape) == 2
    ]
    write_config(target, grid, quantized=modules, kept=others)
    sizes = {info.name: info.size for info in context.header.tensors}
    layers = tuple(
        LayerEffect(
            name=name.removesuffix(".weight"),
            bytes_before=sizes[name],
            bytes_after=sum(out.size for out in swept.outputs[name]),
            relative_error=effect.relative_error,
        )
        for name, effect in swept.effects.items()
    )
    total = sum(swept.effects.values(), Effect())
    return PassRecord(
        index=context.index,
        name=options.pass_,
        seconds=time.monotonic() - start,
        summary={
            "bits": options.bits,
            "group_size": options.group_size,
            "symmetric": options.symmetric,
            "layers": len(layers),
            "relative_error": total.relative_error,
            "measured": f"every row of layers up to {_EXACT_WEIGHTS:,} weights, every {_SAMPLE_EVERY}th of larger ones",
            "bytes_before": sum(sizes.values()),
            "bytes_after": sum(out.size for outputs in swept.outputs.values() for out in outputs),
        },
        layers=layers,
    )


@dataclass(frozen=True)
class PackQuantized:
    """A linear weight as the tensors of compressed-tensors' `pack-quantized`."""

    info: TensorInfo
    grid: Grid

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        rows, columns = self.info.shape
        per_word = 32 // self.grid.bits
        groups = self.grid.groups(columns)
        outputs = [
            tensor_info(self._name("packed"), "I32", (rows, -(-columns // per_word))),
            tensor_info(self._name("scale"), self.info.dtype, (rows, groups)),
            tensor_info(self._name("shape"), "I64", (2,)),
        ]
        if not self.grid.symmetric:
            outputs.append(tensor_info(self._name("zero_point"), "I32", (-(-rows // per_word), groups)))
        return tuple(outputs)

    @property
    def row_step(self) -> int:
        return 32 // self.grid.bits  # zero points are packed down the rows: no word may belong to two chunks

    def __call__(self, rows: Tensor, first_row: int, put: Put, workspace: Workspace) -> Effect:
        every = _SAMPLE_EVERY if math.prod(self.info.shape) > _EXACT_WEIGHTS else 1
        rounded = round_to_grid(rows, self.grid, workspace, measure_every=every)
        packed = pack(rounded.codes, self.grid.bits, workspace)
        put(self._name("packed"), first_row * packed.shape[1] * 4, packed)
        put(self._name("scale"), first_row * rounded.scale[0].nbytes, rounded.scale)
        if rounded.zero_point is not None:
            zero_points = pack_zero_points(rounded.zero_point, self.grid.bits)
            put(self._name("zero_point"), first_row // self.row_step * zero_points[0].nbytes, zero_points)
        if first_row == 0:
            put(self._name("shape"), 0, torch.tensor(self.info.shape))
        return Effect(rounded.squared_error, rounded.squared_norm)

    def _name(self, part: str) -> str:
        return f"{self.info.name}_{part}"
