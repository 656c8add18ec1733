"""What a graph's products are given on calibration text: how far to smooth it, and which range to round it in."""

import contextlib
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.graph.dynamic_int8 import Weights
from nightpress.core.compress.graph.static_graph import QdqGraph
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

#: Largest code of a weight: 255 · 64 · 2 still fits the 16-bit sums of x86 without VNNI, 255 · 127 · 2 doesn't.
TOP = {7: 64, 8: 127}

Ids = NDArray[np.int64]
Feeds = dict[str, Any]


@dataclass(frozen=True)
class Texts:
    ids: Ids  #: [N, S]
    mask: Ids  #: [N, S]

    def feeds(self, inputs: Collection[str], tokens: int) -> Iterator[Feeds]:
        """What a graph is called with, about so many tokens at a time and at least one text."""
        rows = max(1, tokens // self.ids.shape[1])
        for at in range(0, len(self.ids), rows):
            ids, mask = self.ids[at : at + rows], self.mask[at : at + rows]
            found = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
            yield {name: value for name, value in found.items() if name in inputs}

    def __getitem__(self, rows: slice) -> "Texts":
        return Texts(self.ids[rows], self.mask[rows])

    def cut(self, length: int) -> "Texts":
        return Texts(self.ids[:, :length], self.mask[:, :length])


def calibrated(
    graph: Path, texts: Texts, options: StaticInt8, bits: int, folder: Path, context: PassContext
) -> tuple[QdqGraph, dict[str, Range], dict[str, float]]:
    """The smoothed graph with its weights settled, the range of each rounded tensor, and what rounding costs each product.

    The texts run through the graph once for extremes and Gram matrices and, unless extremes are the ranges, once for histograms.
    """
    kept = folder / "calibration.npz"
    if not kept.is_file():
        _calibrate(graph, texts, options, bits, kept, context)
        context.whole(1, kept)
    context.progress(0.59, "making the quantized graph")
    with np.load(kept) as archive:
        found = {name: archive[name] for name in archive.files}

    def settle(name: str, _weight: Tensor) -> StaticWeight:
        kept = {part.name: found[f"{part.name}.{name}"] for part in fields(StaticWeight)}
        return StaticWeight(**kept | {"factors": torch.from_numpy(kept["factors"])})

    plan = QdqGraph.of(graph, options, TOP[bits], settle)
    ranges = {name: tuple(found[f"range.{name}"].tolist()) for name in plan.rounded}
    # Products without a sample of their own, trained ones among them, are ranked by what rounding did to their weights.
    costs = {effect.name: effect.relative_error**2 for effect in plan.effects(()) if effect.name in plan.inputs}
    costs |= dict(plan.costs)
    costs |= {
        name: sum(float(found[f"loss.{operand.tensor}"]) for operand in (scores.query, scores.key))
        for name, scores in plan.scores.items()
    }
    return plan, ranges, costs


def _calibrate(graph: Path, texts: Texts, options: StaticInt8, bits: int, kept: Path, context: PassContext) -> None:
    plain = QdqGraph.of(graph, options, TOP[bits])
    context.progress(0.2, "loading the graph to calibrate it")
    names = sorted(set(plain.rounded))
    given, rounded, scores, operands = set(plain.inputs.values()), plain.rounded, plain.scores, list(plain.operands)
    del plain  # its weights would stand beside the session's
    held = {name: _InputRange(sums=name in given) for name in names}
    with _watching(graph, names, kept.parent, context.threads) as watching:
        for values in _inputs_seen(watching, names, texts, context, 0.2, 0.4):
            for name, value in values.items():
                held[name].add(value)
    for product, name in operands:
        check_finite([product], held[name].extremes())
    return_freed_memory()  # the session's
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
            for values in _inputs_seen(watching, names, texts, context, 0.55, 0.6):
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
    """What a product's input held over the texts: each channel's extremes, zero among them, and some tokens as they were."""

    def __init__(self, *, sums: bool) -> None:
        """sums: keep Σ xxᵀ, which settling weights needs."""
        self.low: Weights = np.zeros(1, np.float32)
        self.high: Weights = np.zeros(1, np.float32)
        self._sample = EvenSample()
        self._sums = sums
        self._gram: Gram | None = None

    def add(self, values: Weights) -> None:
        """Take in [..., in]."""
        x = values.reshape(-1, values.shape[-1])
        self.low, self.high = np.minimum(self.low, x.min(axis=0)), np.maximum(self.high, x.max(axis=0))
        self._sample.add(torch.from_numpy(x))
        if self._sums:
            self._gram = self._gram or Gram(x.shape[1], "cpu")
            self._gram.add(torch.from_numpy(np.ascontiguousarray(x)))

    def extremes(self) -> Tensor:
        """[2, in]"""
        return torch.from_numpy(np.stack([self.low, self.high]))

    def sample(self) -> Tensor:
        """[tokens, in]"""
        return self._sample.tokens()

    def settle(self, weight: Tensor, bits: int) -> StaticWeight:
        """Weights [out, in] of all that read it. Lets go of the Gram matrix, so that it can be asked once."""
        gram, self._gram = self._gram, None
        assert gram is not None
        low, high = (torch.from_numpy(bound) for bound in (self.low, self.high))
        return settle(weight, gram.matrix(), self.sample(), low, high, tokens=gram.tokens, bits=bits)

    def symmetric_loss(self, top: int) -> float:
        """The share of its power that rounding to a grid of −top … top takes."""
        x = self.sample()
        scale = float(activation_ranges.symmetric_scale((float(self.low.min()), float(self.high.max())), top))
        return float(((x / scale).round() * scale - x).square().sum() / x.square().sum().clamp(min=1e-30))


@contextlib.contextmanager
def _watching(graph: Path, names: Sequence[str], folder: Path, threads: int) -> Iterator[Any]:
    """A session of the graph that gives these tensors as well as its outputs."""
    import onnx

    # Messages of protobuf are merged by writing one behind the other: the graph's weights needn't be parsed and copied for more outputs.
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
    loaded: Any, names: Sequence[str], texts: Texts, context: PassContext, start: float, end: float
) -> Iterator[dict[str, NDArray[np.float32]]]:
    """What each tensor holds where the texts have tokens, a batch at a time."""
    inputs = {value.name for value in loaded.get_inputs()}
    done = 0
    for feeds in texts.feeds(inputs, GRAPH_TOKENS):
        real = feeds["attention_mask"] > 0
        values = dict(zip(names, loaded.run(list(names), feeds), strict=True))
        done += len(real)
        context.progress(
            start + (end - start) * done / len(texts.ids), f"calibrating, {done} of {len(texts.ids)} texts"
        )
        yield {name: without_padding(value, real) for name, value in values.items()}


def without_padding(values: NDArray[np.float32], real: NDArray[np.bool_]) -> NDArray[np.float32]:
    """What a graph's tensor [..., channels] holds where texts have tokens, real [B, S]: [tokens, ..., channels].

    A tensor is taken to stand for tokens where it is [B, S, ...], [B · S, channels] or, split into heads, [B, heads, S, width] or
    [B, heads, width, S]. All of any other is returned, such as [B, channels] of pooled texts.
    """
    batch, length = real.shape
    if values.ndim >= 3 and values.shape[:2] == real.shape:
        return values[real]
    if values.ndim == 2 and len(values) == real.size:
        return values[real.ravel()]
    if values.ndim == 4 and len(values) == batch and length in values.shape[2:]:
        return np.moveaxis(values, 2 if values.shape[2] == length else 3, 1)[real]
    return values


def session(graph: bytes | Path, threads: int) -> Any:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.log_severity_level = 3
    source = graph if isinstance(graph, bytes) else str(graph)
    return onnxruntime.InferenceSession(source, settings, providers=["CPUExecutionProvider"])
