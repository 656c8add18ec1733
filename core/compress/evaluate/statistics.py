"""Intervals by the paired bootstrap: seeded, vectorised, on numbers alone."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

RESAMPLES = 2000
LEVEL = 0.95
_BLOCK = 2**22  #: drawn indices held at once


@dataclass(frozen=True)
class Interval:
    """A figure with the ends of its 95% interval."""

    value: float
    low: float
    high: float


def _shown(value: float, draws: Array) -> Interval:
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(draws, [tail, 100 - tail])
    # Of a figure with all examples alike, resampling leaves rounding noise: the interval always holds the value.
    return Interval(float(value), float(min(low, value)), float(max(high, value)))


def resampled_sums(columns: Array, *, seed: int, resamples: int = RESAMPLES) -> Array:
    """Sums over examples drawn with replacement. columns [N, C] → [resamples, C]. The same seed draws the same examples, so sums pair up."""
    count = len(columns)
    rng = np.random.default_rng(seed)
    step = max(1, _BLOCK // max(count, 1))
    parts = []
    for start in range(0, resamples, step):
        draws = rng.integers(0, count, size=(min(step, resamples - start), count))
        # How often each example was drawn, [step, N]: one matrix product then sums all columns.
        flat = draws + np.arange(len(draws))[:, None] * count
        times = np.bincount(flat.ravel(), minlength=len(draws) * count).reshape(len(draws), count)
        parts.append(times @ columns)
    return np.concatenate(parts)


def mean_interval(values: Array, *, seed: int, weights: Array | None = None) -> Interval:
    """The mean of one number an example, or with `weights` the ratio of the sums, e.g. agreements over tokens."""
    values = np.asarray(values, np.float64)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, np.float64)
    sums = resampled_sums(np.stack([values, weights], axis=1), seed=seed)
    return _shown(values.sum() / weights.sum(), sums[:, 0] / np.maximum(sums[:, 1], 1e-12))


@dataclass(frozen=True)
class Paired:
    """A figure of the artifact, and its change relative to the source's on the same examples."""

    figure: Interval
    change: Interval | None  #: None where the source's figure is zero


def ratio_against(
    artifact: Array, source: Array, weights: Array, *, seed: int, of: Callable[[Array], Array] = lambda mean: mean
) -> Paired:
    """Compare `of(Σ artifact / Σ weights)` with the same of `source`, drawing the same examples for both.

    artifact, source, weights [N], one number an example: e.g. summed NLL and tokens of a window with `of=np.exp` for perplexity,
    or hits and ones for accuracy.
    """
    columns = np.stack([artifact, source, weights], axis=1).astype(np.float64)
    sums = resampled_sums(columns, seed=seed)
    drawn = np.maximum(sums[:, 2], 1e-12)
    ours, theirs = of(sums[:, 0] / drawn), of(sums[:, 1] / drawn)
    total = columns.sum(axis=0)
    value, base = float(of(total[0] / total[2])), float(of(total[1] / total[2]))
    change = None
    if base > 0:
        usable = theirs > 0
        change = _shown(value / base - 1, ours[usable] / theirs[usable] - 1)
    return Paired(_shown(value, ours), change)
