"""Calibrate a static int8 graph: find the smoothing factors and the ranges of its products' inputs on calibration text."""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.graph.dynamic_int8 import Weights
from nightpress.core.compress.graph.samples import Feeder, session
from nightpress.core.compress.graph.static_graph import QdqGraph
from nightpress.core.compress.graph.telling import telling
from nightpress.core.compress.grids import activation_ranges
from nightpress.core.compress.grids.activation_ranges import Histogram, Range
from nightpress.core.compress.memory import return_freed_memory
from nightpress.core.compress.model.checkpoint import disk_errors
from nightpress.core.compress.numerical_failures import check_finite
from nightpress.core.compress.solvers.gram import Gram
from nightpress.core.compress.solvers.samples import EvenSample
from nightpress.core.compress.solvers.static_weights import StaticWeight, settle
from nightpress.core.recipes.costs import GRAPH_TOKENS
from nightpress.core.recipes.passes import StaticInt8

#: Bits of a weight → its largest code. 255 · 64 · 2 fits the 16-bit sums of x86 processors without VNNI, 255 · 127 · 2 does not.
TOP = {7: 64, 8: 127}


def calibrated(
    graph: Path, feeder: Feeder, samples: int, options: StaticInt8, bits: int, folder: Path, context: PassContext
) -> tuple[QdqGraph, dict[str, Range], dict[str, float]]:
    """Return the smoothed graph with its codes, the range of each rounded tensor, and the cost of rounding each product.

    feeder: runs `samples` samples through the graph. bits: 7 or 8, of a weight. The samples run once for extremes and Gram matrices. Unless
    the ranges are the extremes, they run a second time for histograms. The result is kept in `folder`, where another attempt finds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "calibration.npz"
    if not kept.is_file():
        _calibrate(graph, feeder, samples, options, bits, kept, context)
        context.whole(1, kept)
    with np.load(kept) as archive:
        found = {name: archive[name] for name in archive.files}

    def settle(name: str, _weight: Tensor) -> StaticWeight:
        kept = {part.name: found[f"{part.name}.{name}"] for part in fields(StaticWeight)}
        return StaticWeight(**kept | {"factors": torch.from_numpy(kept["factors"])})

    with telling(context, 0.59, "making the quantized graph"):
        plan = QdqGraph.of(graph, options, TOP[bits], settle)
    ranges = {name: tuple(found[f"range.{name}"].tolist()) for name in plan.rounded}
    # Products whose output error was not measured, e.g. those with trained weights, are ranked by the rounding error of their weights.
    costs = {effect.name: effect.relative_error**2 for effect in plan.effects(()) if effect.name in plan.inputs}
    costs |= dict(plan.costs)
    costs |= {
        name: sum(float(found[f"loss.{operand.tensor}"]) for operand in (scores.query, scores.key))
        for name, scores in plan.scores.items()
    }
    return plan, ranges, costs


def _calibrate(
    graph: Path, feeder: Feeder, samples: int, options: StaticInt8, bits: int, kept: Path, context: PassContext
) -> None:
    with telling(context, 0.15, "reading the graph"):
        plain = QdqGraph.of(graph, options, TOP[bits])
    context.progress(0.2, "loading the graph to calibrate it")
    names = sorted(set(plain.rounded))
    given, rounded, scores, operands = set(plain.inputs.values()), plain.rounded, plain.scores, list(plain.operands)
    del plain  # otherwise its weights and the session's would be in memory together
    held = {name: _InputRange(sums=name in given) for name in names}
    with _watching(graph, names, kept.parent, context.threads) as watching:
        for values in _inputs_seen(watching, names, feeder, samples, context, 0.2, 0.4):
            for name, value in values.items():
                held[name].add(value)
    for product, name in operands:
        check_finite([product], held[name].extremes())
    return_freed_memory()  # the session has used it
    arrays: dict[str, NDArray[Any]] = {}
    for operand in (x for score in scores.values() for x in (score.query, score.key)):
        arrays[f"loss.{operand.tensor}"] = np.asarray(held[operand.tensor].symmetric_loss(TOP[bits]))
    factors: dict[str, Weights] = {}

    def settle_next(name: str, weight: Tensor) -> StaticWeight:
        context.progress(
            0.4 + 0.15 * len(factors) / len(given), f"rounding weights, {len(factors) + 1} of {len(given)}"
        )
        found = held[name].settle(weight, bits)
        factors[name] = found.factors.numpy()
        arrays.update({f"{part.name}.{name}": np.asarray(getattr(found, part.name)) for part in fields(found)})
        return found

    plan = QdqGraph.of(graph, options, TOP[bits], settle_next)
    origins = dict(zip(plan.rounded, rounded, strict=True))
    del plan
    by = {name: factors[origin] if origin != name else np.float32(1) for name, origin in origins.items()}
    extremes: dict[str, Range] = {
        name: (float((held[origin].low / by[name]).min()), float((held[origin].high / by[name]).max()))
        for name, origin in origins.items()
    }
    ranges = extremes
    if options.ranges != "min-max":
        counts = {name: np.zeros(activation_ranges.BINS) for name in extremes}
        with _watching(graph, names, kept.parent, context.threads) as watching:
            for values in _inputs_seen(watching, names, feeder, samples, context, 0.55, 0.6):
                for name, origin in origins.items():
                    counts[name] += activation_ranges.count(values[origin] / by[name], *extremes[name])
        choose: dict[str, Callable[[Histogram], Range]] = {
            "percentile": lambda histogram: activation_ranges.percentile(histogram, options.percentile),
            "entropy": activation_ranges.entropy,
            "mse": activation_ranges.mse,
        }
        ranges = {name: choose[options.ranges](Histogram(*extremes[name], counts[name])) for name in extremes}
    context.progress(0.58, "writing down ranges and weights")
    with disk_errors():
        arrays |= {f"range.{name}": np.array(bounds) for name, bounds in ranges.items()}
        partial = kept.with_name("partial.npz")
        np.savez(partial, **arrays)  # type: ignore[arg-type]  # numpy's stub reads ** as its keyword
        partial.replace(kept)


class _InputRange:
    """Statistics of a tensor over all texts: each channel's extremes (including zero), a sample of tokens and, with `sums`, Σ xxᵀ."""

    def __init__(self, *, sums: bool) -> None:
        """sums: keep Σ xxᵀ, which `settle` needs."""
        self.low: Weights = np.zeros(1, np.float32)
        self.high: Weights = np.zeros(1, np.float32)
        self._sample = EvenSample()
        self._sums = sums
        self._gram: Gram | None = None

    def add(self, values: Weights) -> None:
        """Add values [..., in]."""
        x = values.reshape(-1, values.shape[-1])
        self.low, self.high = np.minimum(self.low, x.min(axis=0)), np.maximum(self.high, x.max(axis=0))
        self._sample.add(torch.from_numpy(x))
        if self._sums:
            self._gram = self._gram or Gram(x.shape[1], "cpu")
            self._gram.add(torch.from_numpy(np.ascontiguousarray(x)))

    def extremes(self) -> Tensor:
        """The lowest and the highest value of each channel, [2, in]."""
        return torch.from_numpy(np.stack([self.low, self.high]))

    def sample(self) -> Tensor:
        """A sample of the values, [tokens, in]."""
        return self._sample.tokens()

    def settle(self, weight: Tensor, bits: int) -> StaticWeight:
        """Choose factors and codes for the weights [out, in] of all products that read this tensor.

        This frees the Gram matrix, so it can be called only once.
        """
        gram, self._gram = self._gram, None
        assert gram is not None
        low, high = (torch.from_numpy(bound) for bound in (self.low, self.high))
        return settle(weight, gram.matrix(), self.sample(), low, high, tokens=gram.tokens, bits=bits)

    def symmetric_loss(self, top: int) -> float:
        """The squared error of rounding the sample to the grid −top … top, as a share of the sample's power."""
        x = self.sample()
        scale = float(activation_ranges.symmetric_scale((float(self.low.min()), float(self.high.max())), top))
        return float(((x / scale).round() * scale - x).square().sum() / x.square().sum().clamp(min=1e-30))


@contextlib.contextmanager
def _watching(graph: Path, names: Sequence[str], folder: Path, threads: int) -> Iterator[Any]:
    """Open a session of the graph that also returns the tensors `names`. Writes a copy of the graph to `folder` while it is open."""
    import onnx

    # Two protobuf messages are merged by concatenating their bytes. So outputs are added without parsing and copying the graph's weights.
    more = onnx.ModelProto()
    more.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    watched = folder / "watched.onnx"
    try:
        with disk_errors():
            shutil.copyfile(graph, watched)
            with watched.open("ab") as stream:
                stream.write(more.SerializeToString())
        yield session(watched, threads)
    finally:
        watched.unlink(missing_ok=True)


def _inputs_seen(
    loaded: Any, names: Sequence[str], feeder: Feeder, samples: int, context: PassContext, start: float, end: float
) -> Iterator[dict[str, NDArray[np.float32]]]:
    """Yield the values of each tensor without padding, batch by batch. The progress goes from `start` to `end`."""
    done = 0
    for feeds, masks in feeder(loaded, GRAPH_TOKENS):
        values = dict(zip(names, loaded.run(list(names), feeds), strict=True))
        done += len(masks[0])
        context.progress(start + (end - start) * done / samples, f"calibrating, {done} of {samples} samples")
        yield {name: _real_values(value, masks) for name, value in values.items()}


def _real_values(values: NDArray[np.float32], masks: Sequence[NDArray[np.bool_]]) -> NDArray[np.float32]:
    """`without_padding` by the first of the masks whose tokens a tensor has."""
    for real in masks:
        found = without_padding(values, real)
        if found is not values:
            return found
    return values


def without_padding(values: NDArray[np.float32], real: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return the values of a graph's tensor at real tokens: [tokens, ..., channels]. real [B, S] is False at the padding.

    A tensor holds values of tokens if its shape is [B, S, ...], [B · S, channels] or, split into heads, [B, heads, S, width] or
    [B, heads, width, S]. Any other tensor is returned whole, e.g. [B, channels] of pooled texts.
    """
    batch, length = real.shape
    if values.ndim >= 3 and values.shape[:2] == real.shape:
        return values[real]
    if values.ndim == 2 and len(values) == real.size:
        return values[real.ravel()]
    if values.ndim == 4 and len(values) == batch and length in values.shape[2:]:
        return np.moveaxis(values, 2 if values.shape[2] == length else 3, 1)[real]
    return values
