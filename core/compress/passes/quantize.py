"""Quantization passes that need no calibration data: one sweep over the weights."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.executors.rewrite import Effect, Put, Rewrite
from nightpress.core.compress.executors.stream import scan, sweep
from nightpress.core.compress.grids.grid import Grid
from nightpress.core.compress.grids.packing import pack, pack_zero_points
from nightpress.core.compress.grids.rounding import magnitude_bits, round_to_grid
from nightpress.core.compress.grids.stored import dequantized, grid_of, round_weight, to_tensors
from nightpress.core.compress.grids.workspace import Workspace
from nightpress.core.compress.model.checkpoint import StoredTensor, read_shards, tensor_info
from nightpress.core.compress.model.companions import copy_companions
from nightpress.core.compress.model.quantization_config import write_config
from nightpress.core.compress.passes.registry import folder_pass
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.report import LayerEffect, PassRecord
from nightpress.core.recipes.header import TensorInfo
from nightpress.core.recipes.linears import module_of
from nightpress.core.recipes.passes import Quantizing, WeightOnly
from nightpress.core.recipes.schemes import BLOCK, Scheme

#: The rounding error of plain int4 and int8 is exact in layers of up to this many weights. In larger layers it is measured on every 8th
#: row: that is still over a hundred thousand weights. Measuring all rows would take a third of the time of rounding them.
_EXACT_WEIGHTS = 1024**2
_SAMPLE_EVERY = 8


@folder_pass(WeightOnly)
def weight_only(source: Path, target: Path, options: WeightOnly, context: PassContext) -> PassRecord:
    """Round every linear weight to the nearest step of its grid. `target` becomes a compressed-tensors model."""
    summary = {
        "format": options.format,
        "bits": options.bits,
        "group_size": options.group_size,
        "symmetric": options.symmetric,
        "ranges": options.ranges,
        "measured": f"every row of layers up to {_EXACT_WEIGHTS:,} weights, every {_SAMPLE_EVERY}th of larger ones in plain int4 and int8",
    }
    return stream_rounded(source, target, options, context, summary, ranges=options.ranges)


def stream_rounded(
    source: Path,
    target: Path,
    options: Quantizing,
    context: PassContext,
    summary: dict[str, Any],
    *,
    ranges: str = "extremes",
    fast: bool = True,
) -> PassRecord:
    """Round every weight that the options select, in one sweep, and write the `quantization_config` into config.json.

    fast: the chunked kernel may round plain int4 and int8. It multiplies by the reciprocal of the step, so it may round a tie to the other
    side than `round_weight` does. The error is no larger.
    """
    start = time.monotonic()
    infos = {tensor.name: tensor.info for shard in read_shards(source) for tensor in shard.tensors}
    schemes = {module_of(info): options.scheme(module_of(info)) for info in infos.values() if options.takes(info)}
    scanned = any(_needs_largest(scheme) for scheme in schemes.values())
    largest = largest_weights(source, {f"{name}.weight" for name in schemes}, context) if scanned else {}
    # Runtimes fuse layers that share inputs, and then read one global scale for the fused layer. So nvfp4 has one for the whole model.
    of_all = max(largest.values(), default=None)

    def choose(info: TensorInfo) -> Rewrite | None:
        scheme = schemes.get(module_of(info)) if options.takes(info) else None
        if scheme is None:
            return None
        if fast and scheme.format == "pack-quantized" and scheme.bits in {4, 8} and ranges == "extremes":
            return PackQuantized(info, grid_of(scheme))
        top = largest.get(info.name) if scheme.strategy == "tensor" else of_all
        return OnGrid(info, scheme, ranges, top)

    span = (0.3, 1.0) if scanned else (0.0, 1.0)
    swept = sweep(source, target, choose, context, recipe=options.model_dump_json(), span=span)
    copy_companions(source, target)
    others = [
        name.removesuffix(".weight")
        for name, outputs in swept.outputs.items()
        if name not in swept.effects and name.endswith(".weight") and len(outputs[0].shape) == 2
    ]
    write_config(target, schemes, kept=others)
    layers = tuple(
        LayerEffect(
            name=name.removesuffix(".weight"),
            bytes_before=infos[name].size,
            bytes_after=sum(out.size for out in swept.outputs[name]),
            relative_error=effect.relative_error,
        )
        for name, effect in swept.effects.items()
    )
    total = sum(swept.effects.values(), Effect())
    return PassRecord(
        index=context.index,
        name=options.name,
        seconds=time.monotonic() - start,
        summary=summary
        | {
            "layers": len(layers),
            "relative_error": total.relative_error,
            "bytes_before": sum(info.size for info in infos.values()),
            "bytes_after": sum(out.size for outputs in swept.outputs.values() for out in outputs),
        },
        layers=layers,
    )


def _needs_largest(scheme: Scheme) -> bool:
    return scheme.strategy == "tensor" or scheme.has_global_scale


def largest_weights(source: Path, names: set[str], context: PassContext) -> dict[str, float]:
    """Return the largest magnitude of each named tensor."""
    parts: dict[tuple[str, int], float] = {}

    def visit(stored: StoredTensor, first_row: int, rows: Tensor, workspace: Workspace) -> None:
        bits = magnitude_bits(rows, workspace).max()
        parts[stored.name, first_row] = float(bits.view(rows.dtype))

    scan(read_shards(source), names, visit, context, span=(0.0, 0.3))
    return {name: max(value for (other, _), value in parts.items() if other == name) for name in names}


def shared_peak(source: Path, options: Quantizing, context: PassContext) -> float | None:
    """Return the largest magnitude of all weights that the options take; None if no scheme has a global scale.

    Runtimes fuse layers that share inputs, and then read one global scale for the fused layer. So nvfp4 has one for the whole model.
    """
    infos = [tensor.info for shard in read_shards(source) for tensor in shard.tensors]
    names = {info.name for info in infos if options.takes(info) and options.scheme(module_of(info)).has_global_scale}
    return max(largest_weights(source, names, context).values()) if names else None


@dataclass(frozen=True)
class OnGrid:
    """Rewrites a weight [out, in] as the tensors of its scheme, a chunk of rows at a time."""

    info: TensorInfo
    scheme: Scheme
    ranges: str = "extremes"
    largest: float | None = None  #: as in `round_weight`

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        return self.scheme.outputs(self.info)

    @property
    def row_step(self) -> int:
        if self.scheme.strategy == "block":
            return BLOCK
        # A word holds the zero points of several rows, and may not span two chunks.
        return 1 if self.scheme.symmetric else 32

    def __call__(self, rows: Tensor, first_row: int, put: Put, workspace: Workspace) -> Effect:
        del workspace
        weight = rows.float()
        if not bool(torch.isfinite(weight).all()):
            raise NightpressError(
                ErrorCode.NUMERICAL_FAILURE,
                "A weight holds NaN or infinity.",
                hint="The source model is damaged: export it again.",
            )
        coded = round_weight(weight, self.scheme, rows.dtype, ranges=self.ranges, largest=self.largest)
        for name, tensor in to_tensors(self.info.name, self.scheme, coded).items():
            if name.endswith("_shape"):
                tensor = torch.tensor(self.info.shape)
            if tensor.dim() == 1 and first_row > 0:
                continue  # one for the whole weight: the first chunk writes it
            at = first_row
            if name.endswith("_zero_point"):
                at = first_row * self.scheme.bits // 32
            elif self.scheme.strategy == "block" and name.endswith("_scale"):
                at = first_row // BLOCK
            put(name, at * tensor[0].nbytes, tensor)
        after = dequantized(coded, self.scheme)
        return Effect(float((weight - after).square().sum()), float(weight.square().sum()))


@dataclass(frozen=True)
class PackQuantized:
    """Rewrites a linear weight [out, in] as the tensors of compressed-tensors' `pack-quantized`, by the chunked kernel."""

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
        return 32 // self.grid.bits  # A word holds the zero points of several rows, and may not span two chunks.

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
