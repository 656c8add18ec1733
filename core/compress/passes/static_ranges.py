"""What a graph's products are given on calibration text: how far to smooth it, and which range to round it in."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.compress.checkpoint import disk_errors
from core.compress.context import PassContext
from core.compress.numbers import check_finite
from core.compress.passes.quantize_graph import Weights
from core.compress.passes.static_graph import QdqGraph
from core.compress.solvers import activation_ranges
from core.compress.solvers.activation_ranges import Histogram, Range
from core.compress.solvers.grid import Grid
from core.compress.solvers.samples import EvenSample
from core.compress.solvers.smooth import Taker, search_factors
from core.recipes.costs import GRAPH_TOKENS
from core.recipes.passes import StaticInt8

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
    graph: Path, texts: Texts, options: StaticInt8, top: int, folder: Path, context: PassContext
) -> tuple[QdqGraph, dict[str, Range]]:
    """The smoothed graph, and the range of each product's input, from running over the texts: once for extremes, once for histograms."""
    kept = folder / "calibration.npz"
    if not kept.is_file():
        _calibrate(graph, texts, options, top, kept, context)
        context.whole(1, kept)
    with np.load(kept) as archive:
        found = {name: archive[name] for name in archive.files}
    plan = QdqGraph.of(graph, options, top, lambda name, _weight: torch.from_numpy(found[f"factors.{name}"]))
    ranges = {name: tuple(found[f"range.{name}"].tolist()) for name in plan.rounded}
    return plan, ranges


def _calibrate(graph: Path, texts: Texts, options: StaticInt8, top: int, kept: Path, context: PassContext) -> None:
    plain = QdqGraph.of(graph, options, top)
    held: dict[str, _Held] = {name: _Held() for name in sorted(set(plain.rounded))}
    for values in _inputs_seen(plain, list(held), texts, context, 0.2, 0.4):
        for name, one in values.items():
            held[name].add(one)
    for product, name in plain.operands:
        check_finite([product], held[name].extremes())
    factors: dict[str, Weights] = {}

    def factors_of(name: str, weight: Tensor) -> Tensor:
        largest = torch.from_numpy(np.maximum(-held[name].low, held[name].high))
        chosen = search_factors([Taker(weight, held[name].sample(), largest, "static")], Grid(8))
        factors[name] = chosen.numpy()
        return chosen

    plan = QdqGraph.of(graph, options, top, factors_of)
    extremes: dict[str, Range] = {}
    for name, given in zip(plain.rounded, plan.rounded, strict=True):
        by = factors[name] if given != name else np.float32(1)
        extremes[given] = float((held[name].low / by).min()), float((held[name].high / by).max())
    ranges = extremes
    if options.ranges != "min-max":
        counts = {name: np.zeros(activation_ranges.BINS) for name in extremes}
        for values in _inputs_seen(plan, list(extremes), texts, context, 0.4, 0.6):
            for name, one in values.items():
                counts[name] += activation_ranges.count(one, *extremes[name])
        choose: dict[str, Callable[[Histogram], Range]] = {
            "percentile": lambda one: activation_ranges.percentile(one, options.percentile),
            "entropy": activation_ranges.entropy,
            "mse": activation_ranges.mse,
        }
        ranges = {name: choose[options.ranges](Histogram(*extremes[name], counts[name])) for name in extremes}
    with disk_errors():
        arrays = {f"factors.{name}": one for name, one in factors.items()}
        arrays |= {f"range.{name}": np.array(one) for name, one in ranges.items()}
        partial = kept.with_name("partial.npz")
        np.savez(partial, **arrays)  # type: ignore[arg-type]  # numpy's stub reads ** as its keyword
        partial.replace(kept)


class _Held:
    """What a product's input held over the texts: each channel's extremes, zero among them, and some tokens as they were."""

    def __init__(self) -> None:
        self.low: Weights = np.zeros(1, np.float32)
        self.high: Weights = np.zeros(1, np.float32)
        self._sample = EvenSample()

    def add(self, values: Weights) -> None:
        """Take in [..., in]."""
        x = values.reshape(-1, values.shape[-1])
        self.low, self.high = np.minimum(self.low, x.min(axis=0)), np.maximum(self.high, x.max(axis=0))
        self._sample.add(torch.from_numpy(x))

    def extremes(self) -> Tensor:
        """[2, in]"""
        return torch.from_numpy(np.stack([self.low, self.high]))

    def sample(self) -> Tensor:
        """[tokens, in]"""
        return self._sample.tokens()


def _inputs_seen(
    plan: QdqGraph, names: Sequence[str], texts: Texts, context: PassContext, start: float, end: float
) -> Iterator[dict[str, NDArray[np.float32]]]:
    """What each tensor holds where the texts have tokens, a batch at a time."""
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(plan.model)
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    loaded = session(model.SerializeToString(), context.threads)
    inputs = {one.name for one in loaded.get_inputs()}
    done = 0
    for feeds in texts.feeds(inputs, GRAPH_TOKENS):
        real = feeds["attention_mask"] > 0
        values = dict(zip(names, loaded.run(list(names), feeds), strict=True))
        done += len(real)
        context.progress(
            start + (end - start) * done / len(texts.ids), f"calibrating, {done} of {len(texts.ids)} texts"
        )
        yield {name: without_padding(one, real) for name, one in values.items()}


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
