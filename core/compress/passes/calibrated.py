"""Passes that look at what a model's layers are given: GPTQ, AWQ, SparseGPT and Wanda, one block at a time."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.compress.architectures import FOLDS, Fold
from core.compress.checkpoint import read_shards
from core.compress.context import PassContext
from core.compress.evaluate.calibration import calibration_samples
from core.compress.executors.blocks import Inputs, Method, Pressed, Settled, Statistic, press_blocks
from core.compress.executors.rewrite import Effect
from core.compress.executors.stream import copy_companions
from core.compress.export.compressed_tensors import write_config
from core.compress.solvers.awq import search_scales
from core.compress.solvers.gram import Gram
from core.compress.solvers.grid import Grid, dequantize
from core.compress.solvers.obs import Prune, Quantize, factorize, solve
from core.compress.solvers.packing import pack_bits, unpack_bits
from core.compress.solvers.ranges import find_ranges, nearest_codes
from core.compress.solvers.wanda import Power, wanda_mask
from core.handoff.report import LayerEffect, PassRecord
from core.recipes.header import ModelHeader
from core.recipes.linears import is_linear_weight
from core.recipes.passes import Awq, Gptq, SparseGpt, Wanda


def gptq(source: Path, target: Path, options: Gptq, context: PassContext) -> PassRecord:
    """Quantize with GPTQ, pruning on the way if asked to. `target` becomes a compressed-tensors `pack-quantized` model."""
    grid = Grid(options.bits, options.group_size, options.symmetric)
    return _quantize(source, target, Quantized(options, grid), grid, options, context)


def awq(source: Path, target: Path, options: Awq, context: PassContext) -> PassRecord:
    """Quantize with AWQ. `target` becomes a compressed-tensors `pack-quantized` model, its norms scaled."""
    grid = Grid(options.bits, options.group_size, options.symmetric)
    return _quantize(source, target, ActivationAware(options, grid, context.header), grid, options, context)


def sparsegpt(source: Path, target: Path, options: SparseGpt, context: PassContext) -> PassRecord:
    """Prune with SparseGPT; a dense model of the same size comes out."""
    start = time.monotonic()
    return _record(options, context, _press(source, target, Sparse(options), options, context), start, {})


def wanda(source: Path, target: Path, options: Wanda, context: PassContext) -> PassRecord:
    """Prune with Wanda; a dense model of the same size comes out."""
    start = time.monotonic()
    return _record(options, context, _press(source, target, WeightAndActivation(options), options, context), start, {})


class _GroupByGroup:
    """A method that settles the weights behind each tensor by themselves."""

    by_group = True

    def settle(self, block: Mapping[str, Tensor], inputs: Sequence[Inputs], device: torch.device) -> dict[str, Settled]:
        settled: dict[str, Settled] = {}
        for one in inputs:
            settled |= self._settle({name: block[name].to(device) for name in one.names}, one.statistic)
        return settled

    def _settle(self, weights: Mapping[str, Tensor], statistic: Statistic) -> dict[str, Settled]:
        raise NotImplementedError


class Quantized(_GroupByGroup):
    """Codes, scales and zero points found by the Optimal-Brain-Surgeon solver."""

    def __init__(self, options: Gptq, grid: Grid) -> None:
        self._options, self._grid = options, grid
        self._prune = None if options.sparsity is None else _prune(options.sparsity, options.pattern)

    def watch(self, columns: int, device: torch.device) -> Gram:
        return Gram(columns, device)

    def _settle(self, weights: Mapping[str, Tensor], statistic: Statistic) -> dict[str, Settled]:
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
                assert solved.codes is not None
                assert solved.scale is not None
                zero_point = None if solved.zero_point is None else solved.zero_point[rows]
                settled[name] = _encode(
                    name, self._grid, solved.codes[rows], solved.scale[rows], zero_point, stacked[rows]
                )
                start = rows.stop
        return settled

    def restore(self, name: str, written: Mapping[str, Tensor]) -> Tensor:
        return _decode(name, self._grid, written)


class Sparse(_GroupByGroup):
    """Weights under a mask, the others having made up for what went."""

    def __init__(self, options: SparseGpt) -> None:
        self._damping, self._prune = options.damping, _prune(options.sparsity, options.pattern)

    def watch(self, columns: int, device: torch.device) -> Gram:
        return Gram(columns, device)

    def _settle(self, weights: Mapping[str, Tensor], statistic: Statistic) -> dict[str, Settled]:
        assert isinstance(statistic, Gram)
        factor = factorize(statistic.matrix(), damping=self._damping)
        settled = {}
        # Rows don't depend on each other, but unstructured pruning would share its quota among the weights.
        for names in [[name] for name in weights] if self._prune.pattern is None else [list(weights)]:
            before = torch.cat([weights[name].float() for name in names])
            after = solve(before, factor, prune=self._prune).weight
            counts = [len(weights[name]) for name in names]
            for name, was, now in zip(names, torch.split(before, counts), torch.split(after, counts), strict=True):
                value = now.to(weights[name].dtype, copy=True)
                settled[name] = Settled(weight=value, tensors={name: value}, effect=_effect(was, value.float()))
        return settled

    def restore(self, name: str, written: Mapping[str, Tensor]) -> Tensor:
        return written[name]


class WeightAndActivation(_GroupByGroup):
    """Weights under Wanda's mask."""

    def __init__(self, options: Wanda) -> None:
        self._prune = _prune(options.sparsity, options.pattern)

    def watch(self, columns: int, device: torch.device) -> Power:
        return Power(columns, device)

    def _settle(self, weights: Mapping[str, Tensor], statistic: Statistic) -> dict[str, Settled]:
        assert isinstance(statistic, Power)
        settled = {}
        for name, weight in weights.items():
            gone = wanda_mask(weight, statistic.sum, self._prune.sparsity, self._prune.pattern)
            after = weight.masked_fill(gone, 0)
            effect = _effect(weight.float(), after.float())
            settled[name] = Settled(weight=after, tensors={name: after}, effect=effect)
        return settled

    def restore(self, name: str, written: Mapping[str, Tensor]) -> Tensor:
        return written[name]


class ActivationAware:
    """Weights rounded to nearest after their columns were scaled, what stands before them making up for it."""

    by_group = False  # what stands before them has run already when their inputs are known

    def __init__(self, options: Awq, grid: Grid, header: ModelHeader) -> None:
        self._options, self._grid = options, grid
        self._folds = FOLDS[header.model_type]
        config = header.config
        heads = int(config["num_attention_heads"])
        self._value_heads = int(config.get("num_key_value_heads") or heads)
        self._head_width = int(config.get("head_dim") or config["hidden_size"] // heads)

    def watch(self, columns: int, device: torch.device) -> Gram:
        return Gram(columns, device)

    def settle(self, block: Mapping[str, Tensor], inputs: Sequence[Inputs], device: torch.device) -> dict[str, Settled]:
        seen = {name: one for one in inputs for name in one.names}
        floats = {name: block[name].to(device).float() for name in seen}
        factors: dict[str, Tensor] = {}
        for fold in self._folds:
            self._fold(fold, block, seen, floats, factors)
        settled = {}
        for name, weight in floats.items():
            stored = block[name].dtype
            if name not in seen:  # a norm or a bias that makes up for it
                value = weight.to(stored)
                settled[name] = Settled(weight=value, tensors={name: value}, effect=None)
                continue
            importance = None
            if self._options.ranges == "least-error":
                statistic = seen[name].statistic
                assert isinstance(statistic, Gram)
                importance = statistic.matrix().diagonal() / factors.get(name, torch.ones((), device=device)).square()
            scale, zero_point = find_ranges(weight, self._grid, stored, importance=importance)
            codes = nearest_codes(weight, scale, zero_point, self._grid).to(torch.int8)
            zeros = None if self._grid.symmetric else zero_point.to(torch.int8)
            settled[name] = _encode(name, self._grid, codes, scale.to(stored), zeros, weight)
        return settled

    def restore(self, name: str, written: Mapping[str, Tensor]) -> Tensor:
        return _decode(name, self._grid, written)

    def _fold(
        self,
        fold: Fold,
        block: Mapping[str, Tensor],
        seen: Mapping[str, Inputs],
        floats: dict[str, Tensor],
        factors: dict[str, Tensor],
    ) -> None:
        """Find the factors of one place and apply them, if every layer that sees its output is among those to quantize."""
        last = f"{fold.targets[0]}.weight"
        prefix = next((name.removesuffix(last) for name in seen if name.endswith("." + last)), None)
        targets = [f"{prefix}{target}.weight" for target in fold.targets]
        if prefix is None or not all(name in seen for name in targets) or set(seen[targets[0]].names) != set(targets):
            return
        source, bias = f"{prefix}{fold.source}.weight", f"{prefix}{fold.source}.bias"
        statistic = seen[targets[0]].statistic
        assert isinstance(statistic, Gram)
        stacked = torch.cat([floats[name] for name in targets])
        share = (self._value_heads, self._head_width) if fold.kind == "values" else (1, 1)
        found = search_scales(stacked, statistic.matrix(), self._grid, block[targets[0]].dtype, share=share)
        for name in targets:
            floats[name] = floats[name] * found
            factors[name] = found
        if fold.kind == "values":
            found = found.view(self._value_heads, -1, self._head_width)[:, 0].reshape(-1)
        before = floats[source] if source in floats else block[source].to(found.device).float()
        if fold.kind == "norm+1":
            floats[source] = (1 + before) / found - 1
        else:
            floats[source] = before / found.view(-1, *[1] * (before.dim() - 1))
        if bias in block:
            floats[bias] = (floats[bias] if bias in floats else block[bias].to(found.device).float()) / found


def _encode(name: str, grid: Grid, codes: Tensor, scale: Tensor, zero_point: Tensor | None, before: Tensor) -> Settled:
    """A weight on a grid as the tensors of `pack-quantized`; the scales have the dtype the weight was stored in."""
    tensors = {
        f"{name}_packed": pack_bits(codes, grid.bits),
        f"{name}_scale": scale,
        f"{name}_shape": torch.tensor(codes.shape),
    }
    if zero_point is not None:  # packed down the rows
        tensors[f"{name}_zero_point"] = pack_bits(zero_point.t(), grid.bits).t().contiguous()
    weight = dequantize(codes, scale, zero_point)
    return Settled(weight=weight.to(scale.dtype), tensors=tensors, effect=_effect(before, weight))


def _decode(name: str, grid: Grid, written: Mapping[str, Tensor]) -> Tensor:
    """The weight that `_encode` wrote."""
    rows, columns = written[f"{name}_shape"].tolist()
    zero_point = None
    if not grid.symmetric:
        zero_point = unpack_bits(written[f"{name}_zero_point"].t().contiguous(), grid.bits, rows).t()
    return dequantize(unpack_bits(written[f"{name}_packed"], grid.bits, columns), written[f"{name}_scale"], zero_point)


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


def _quantize(
    source: Path, target: Path, method: Method, grid: Grid, options: Gptq | Awq, context: PassContext
) -> PassRecord:
    start = time.monotonic()
    pressed = _press(source, target, method, options, context)
    modules = [name.removesuffix(".weight") for name in pressed.effects]
    write_config(target, grid, quantized=modules, kept=[name.removesuffix(".weight") for name in pressed.kept])
    summary: dict[str, Any] = {"bits": options.bits, "group_size": options.group_size, "symmetric": options.symmetric}
    return _record(options, context, pressed, start, summary)


def _press(
    source: Path, target: Path, method: Method, options: Gptq | Awq | SparseGpt | Wanda, context: PassContext
) -> Pressed:
    infos = [one.info for shard in read_shards(source) for one in shard.tensors]
    chosen = frozenset(info.name for info in infos if is_linear_weight(info, options.ignore))
    pressed = press_blocks(
        source,
        target,
        method,
        calibration_samples(source, context),
        context,
        chosen=chosen,
        recipe=options.model_dump_json(),
    )
    copy_companions(source, target)
    return pressed


def _record(
    options: Gptq | Awq | SparseGpt | Wanda,
    context: PassContext,
    pressed: Pressed,
    start: float,
    summary: dict[str, Any],
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
            "starved_experts": pressed.starved,
        },
        layers=layers,
    )
