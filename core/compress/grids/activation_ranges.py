"""Activation ranges from histograms: the part of a layer's input values that 256 levels should cover."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEVELS = 256
BINS = 2048  #: 8 bins for each level if nothing is clipped, as in TensorRT's calibration
_SHARES = np.geomspace(0.02, 1, 40)  #: bounds that are tried, as shares of an extreme

Counts = NDArray[np.float64]
Range = tuple[float, float]


@dataclass(frozen=True)
class Histogram:
    """Counts of values in equal bins between `low` ≤ 0 and `high` ≥ 0."""

    low: float
    high: float
    counts: Counts  #: [BINS]

    @property
    def centres(self) -> Counts:
        edges = np.linspace(self.low, self.high, len(self.counts) + 1)
        middle: Counts = (edges[1:] + edges[:-1]) / 2
        return middle


def count(values: NDArray[np.float32], low: float, high: float) -> Counts:
    """How many of the values fall into each of the bins between `low` and `high`, float64 [BINS]."""
    return np.histogram(values, bins=BINS, range=(low, high))[0].astype(np.float64)


def scale_and_zero(found: Range) -> tuple[np.float32, np.uint8]:
    """The scale and the zero point of the uint8 grid over a range that contains 0: x ≈ (code − zero) · scale."""
    low, high = found
    scale = np.float32((high - low) / (LEVELS - 1) or 1.0)
    return scale, np.uint8(np.clip(np.rint(-low / scale), 0, LEVELS - 1))


def symmetric_scale(found: Range, top: int) -> np.float32:
    """The scale of a grid with codes −top … top that covers a range."""
    return np.float32(max(-found[0], found[1]) / top or 1.0)


def min_max(seen: Histogram) -> Range:
    """The whole range of the values."""
    return seen.low, seen.high


def percentile(seen: Histogram, share: float) -> Range:
    """The range without the outermost (100 − share)% of the values, half of these on each side. share is in percent."""
    mass = np.cumsum(seen.counts) / seen.counts.sum()
    tail = (1 - share / 100) / 2
    edges = np.linspace(seen.low, seen.high, len(seen.counts) + 1)
    first = int(np.searchsorted(mass, tail, side="right"))
    last = int(np.searchsorted(mass, 1 - tail, side="left"))
    return min(float(edges[first]), 0.0), max(float(edges[min(last + 1, len(seen.counts))]), 0.0)


def mse(seen: Histogram) -> Range:
    """The range with the least squared error: step²/12 for each value inside (uniform rounding), the squared distance to it outside."""
    centres, total = seen.centres, seen.counts

    def loss(low: float, high: float) -> float:
        step = (high - low) / (LEVELS - 1)
        beyond = centres - np.clip(centres, low, high)
        inside = (centres >= low) & (centres <= high)
        return float((total * beyond**2).sum() + total[inside].sum() * step**2 / 12)

    return _best(seen, loss)


def entropy(seen: Histogram) -> Range:
    """The range whose quantized distribution is nearest to the original one by Kullback-Leibler divergence.

    Clipped values are counted in the outermost bins. The mass of a level is spread over its bins that are not empty. Migacz, 8-bit
    Inference with TensorRT (2017). Ranges of fewer than 256 bins are not tried: rounding would not change their histogram.
    """
    centres, counts = seen.centres, seen.counts
    width = (seen.high - seen.low) / len(counts)

    def loss(low: float, high: float) -> float:
        inside = np.flatnonzero((centres >= low) & (centres <= high))
        if len(inside) < LEVELS:
            return np.inf
        kept = counts[inside]
        clipped = kept.copy()
        clipped[0] += counts[: inside[0]].sum()
        clipped[-1] += counts[inside[-1] + 1 :].sum()
        level = np.minimum(((centres[inside] - low) / max(high - low, width) * LEVELS).astype(np.int64), LEVELS - 1)
        holding = kept > 0
        mass = np.bincount(level, kept, LEVELS)
        places = np.bincount(level, holding, LEVELS)
        spread = np.where(holding, (mass / np.maximum(places, 1))[level], 0)
        p, q = clipped / clipped.sum(), spread / max(spread.sum(), 1)
        some = p > 0
        return float((p[some] * np.log(p[some] / np.maximum(q[some], 1e-12))).sum())

    return _best(seen, loss)


def _best(seen: Histogram, loss: Callable[[float, float], float]) -> Range:
    if seen.low == seen.high:  # all inputs of the layer were zero
        return min_max(seen)
    return min(_candidates(seen), key=lambda candidate: loss(*candidate))


def _candidates(seen: Histogram) -> Iterator[Range]:
    """Ranges to try. The whole range is the first, so that it wins against ranges with the same loss."""
    shares = _SHARES[::-1]
    for low in shares if seen.low < 0 else shares[:1]:
        for high in shares if seen.high > 0 else shares[:1]:
            yield float(seen.low * low), float(seen.high * high)
