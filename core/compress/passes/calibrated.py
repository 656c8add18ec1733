"""Passes that look at what a model's layers are given: GPTQ, SparseGPT and Wanda, one block at a time."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.compress.checkpoint import read_shards
from core.compress.evaluate.data import open_tokenizer, read_rows, text_windows
from core.compress.executors.blocks import Method, Pressed, Settled, Statistic, press_blocks
from core.compress.executors.rewrite import Effect
from core.compress.executors.stream import copy_companions
from core.compress.export.compressed_tensors import write_config
from core.compress.passes.context import PassContext
from core.compress.solvers.gram import Gram
from core.compress.solvers.grid import Grid, dequantize
from core.compress.solvers.obs import Prune, Quantize, Solved, factorize, solve
from core.compress.solvers.packing import pack_bits, unpack_bits
from core.compress.solvers.wanda import Power, wanda_mask
from core.handoff.report import LayerEffect, PassRecord
from core.recipes.passes import Gptq, SparseGpt, Wanda
from core.recipes.plan import is_linear_weight


def gptq(source: Path, target: Path, options: Gptq, context: PassContext) -> PassRecord:
    """Quantize with GPTQ, pruning on the way if asked to. `target` becomes a compressed-tensors `pack-quantized` model."""
    grid = Grid(options.bits, options.group_size, options.symmetric)
    start = time.monotonic()
    pressed = _press(source, target, Quantized(options, grid), options, context)
    modules = [name.removesuffix(".weight") for name in pressed.effects]
    write_config(target, grid, quantized=modules, kept=[name.removesuffix(".weight") for name in pressed.kept])
    summary: dict[str, Any] = {"bits": options.bits, "group_size": options.group_size, "symmetric": options.symmetric}
    return _record(options, context, pressed, start, summary)


def sparsegpt(source: Path, target: Path, options: SparseGpt, context: PassContext) -> PassRecord:
    """Prune with SparseGPT; a dense model of the same size comes out."""
    start = time.monotonic()
    return _record(options, context, _press(source, target, Sparse(options), options, context), start, {})


def wanda(source: Path, target: Path, options: Wanda, context: PassContext) -> PassRecord:
    """Prune with Wanda; a dense model of the same size comes out."""
    start = time.monotonic()
    return _record(options, context, _press(source, target, WeightAndActivation(options), options, context), start, {})


class Quantized:
    """Codes, scales and zero points found by the Optimal-Brain-Surgeon solver."""

    def __init__(self, options: Gptq, grid: Grid) -> None:
        self._options, self._grid = options, grid
        self._prune = None if options.sparsity is None else _prune(options.sparsity, options.pattern)

    def watch(self, columns: int, device: torch.device) -> Gram:
        return Gram(columns, device)

    def settle(self, weights: Mapping[str, Tensor], statistic: Statistic) -> dict[str, Settled]:
        assert isinstance(statistic, Gram)
        by_power = self._options.order == "activation"
        factor = factorize(statistic.matrix(), damping=self._options.damping, by_power=by_power)
        shares_quota = self._prune is not None and self._prune.pattern is None
        settled: dict[str, Settled] = {}
        for names in [[name] for name in weights] if shares_quota else [list(weights)]:
            stacked = torch.cat([weights[name].float() for name in names])
            how = Quantize(self._grid, weights[names[0]].dtype, search=self._options.ranges == "least-error")
            solved = solve(stacked, factor, how, self._prune)
            start = 0
            for name in names:
                rows = slice(start, start + len(weights[name]))
                settled[name] = self._encode(name, solved, rows, stacked[rows], weights[name].dtype)
                start = rows.stop
        return settled

    def restore(self, name: str, written: Mapping[str, Tensor]) -> Tensor:
        rows, columns = written[f"{name}_shape"].tolist()
        zero_point = None
        if not self._grid.symmetric:
            packed = written[f"{name}_zero_point"]
            zero_point = unpack_bits(packed.t().contiguous(), self._grid.bits, rows).t()
        codes = unpack_bits(written[f"{name}_packed"], self._grid.bits, columns)
        return dequantize(codes, written[f"{name}_scale"], zero_point)

    def _encode(self, name: str, solved: Solved, rows: slice, before: Tensor, stored: torch.dtype) -> Settled:
        assert solved.codes is not None
        assert solved.scale is not None
        codes, scale = solved.codes[rows], solved.scale[rows]
        zero_point = None if solved.zero_point is None else solved.zero_point[rows]
        tensors = {
            f"{name}_packed": pack_bits(codes, self._grid.bits).cpu(),
            f"{name}_scale": scale.cpu(),
            f"{name}_shape": torch.tensor(codes.shape),
        }
        if zero_point is not None:  # packed down the rows
            tensors[f"{name}_zero_point"] = pack_bits(zero_point.t(), self._grid.bits).t().contiguous().cpu()
        weight = dequantize(codes, scale, zero_point)
        return Settled(weight=weight.to(stored), tensors=tensors, effect=_effect(before, weight))


class Sparse:
    """Weights under a mask, the others having made up for what went."""

    def __init__(self, options: SparseGpt) -> None:
        self._damping, self._prune = options.damping, _prune(options.sparsity, options.pattern)

    def watch(self, columns: int, device: torch.device) -> Gram:
        return Gram(columns, device)

    def settle(self, weights: Mapping[str, Tensor], statistic: Statistic) -> dict[str, Settled]:
        assert isinstance(statistic, Gram)
        factor = factorize(statistic.matrix(), damping=self._damping)
        settled = {}
        for name, weight in weights.items():
            before = weight.float()
            after = solve(before, factor, prune=self._prune).weight.to(weight.dtype)
            settled[name] = Settled(weight=after, tensors={name: after.cpu()}, effect=_effect(before, after.float()))
        return settled

    def restore(self, name: str, written: Mapping[str, Tensor]) -> Tensor:
        return written[name]


class WeightAndActivation:
    """Weights under Wanda's mask."""

    def __init__(self, options: Wanda) -> None:
        self._prune = _prune(options.sparsity, options.pattern)

    def watch(self, columns: int, device: torch.device) -> Power:
        return Power(columns, device)

    def settle(self, weights: Mapping[str, Tensor], statistic: Statistic) -> dict[str, Settled]:
        assert isinstance(statistic, Power)
        settled = {}
        for name, weight in weights.items():
            gone = wanda_mask(weight, statistic.sum, self._prune.sparsity, self._prune.pattern)
            after = weight.masked_fill(gone, 0)
            effect = _effect(weight.float(), after.float())
            settled[name] = Settled(weight=after, tensors={name: after.cpu()}, effect=effect)
        return settled

    def restore(self, name: str, written: Mapping[str, Tensor]) -> Tensor:
        return written[name]


def _prune(sparsity: float, pattern: str) -> Prune:
    if pattern == "unstructured":
        return Prune(sparsity)
    kept, of = (int(part) for part in pattern.split(":"))
    return Prune(1 - kept / of, (kept, of))


def _effect(before: Tensor, after: Tensor) -> Effect:
    return Effect(
        squared_error=float((before - after).square().sum(dtype=torch.float64)),
        squared_norm=float(before.square().sum(dtype=torch.float64)),
        zeros=int((after == 0).sum()),
    )


def _press(
    source: Path, target: Path, method: Method, options: Gptq | SparseGpt | Wanda, context: PassContext
) -> Pressed:
    infos = [one.info for shard in read_shards(source) for one in shard.tensors]
    chosen = frozenset(info.name for info in infos if is_linear_weight(info, options.ignore))
    pressed = press_blocks(
        source,
        target,
        method,
        calibration_ids(source, context),
        context,
        chosen=chosen,
        recipe=options.model_dump_json(),
    )
    copy_companions(source, target)
    return pressed


def calibration_ids(source: Path, context: PassContext) -> Tensor:
    """Token ids [samples, length] of whole windows of the recipe's calibration text. Raises NightpressError(invalid_data)."""
    wanted = context.calibration
    rows = read_rows(wanted.data, context.data_files.get(wanted.data), purpose="calibration")
    tokenizer = open_tokenizer(source)
    longest = context.header.config.get("max_position_embeddings")
    length = min(wanted.length, longest) if isinstance(longest, int) else wanted.length
    windows = text_windows(rows, tokenizer, samples=wanted.samples, length=length, ref=wanted.data)
    return torch.from_numpy(windows.ids)


def _record(
    options: Gptq | SparseGpt | Wanda, context: PassContext, pressed: Pressed, start: float, summary: dict[str, Any]
) -> PassRecord:
    infos = {info.name: info for info in context.header.tensors}
    total = sum(pressed.effects.values(), Effect())
    weights = sum(infos[name].shape[0] * infos[name].shape[1] for name in pressed.effects)
    layers = tuple(
        LayerEffect(
            name=name.removesuffix(".weight"),
            bytes_before=infos[name].size,
            bytes_after=pressed.bytes_after[name],
            relative_error=effect.relative_error,
            sparsity=effect.zeros / (infos[name].shape[0] * infos[name].shape[1]),
        )
        for name, effect in pressed.effects.items()
    )
    return PassRecord(
        index=context.index,
        name=options.pass_,
        seconds=time.monotonic() - start,
        summary=summary
        | {
            "layers": len(layers),
            "zeros": total.zeros,
            "sparsity": total.zeros / max(1, weights),
            "relative_error": total.relative_error,
            "bytes_before": sum(info.size for info in infos.values()),
            "bytes_after": sum(info.size for name, info in infos.items() if name not in pressed.effects)
            + sum(pressed.bytes_after.values()),
            "uncalibrated": list(pressed.unseen),
        },
        layers=layers,
    )
