"""Confidence intervals by the paired percentile bootstrap, with a seed, vectorised over the resamples.

A statistic is a function of how often each example was drawn: `times` [R, N] → [R]. So the same draws serve every figure of every model,
and figures that are not means (F1, rank correlations) are resampled like the others. Efron and Tibshirani, An Introduction to the
Bootstrap (1993), chapter 13. docs/decisions/0050-percentile-bootstrap.md says why percentiles are used.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]

RESAMPLES = 2000
LEVEL = 0.95
TAIL = (1 - LEVEL) / 2  #: share of the draws beyond each end of an interval
_BLOCK = 2**22  #: drawn indices that are held in memory at once


@dataclass(frozen=True)
class Interval:
    """A figure with the ends of its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Paired:
    """A figure of the artifact, and its relative change from the source's figure on the same examples."""

    figure: Interval
    change: Interval | None  #: None if the source's figure is not above zero


def interval(statistic: Statistic, count: int, *, seed: int, tail: float = TAIL) -> Interval:
    """A statistic of `count` examples, with its 95% interval. tail: the share of the draws beyond each end; see `expanded_tail`."""
    draws = np.concatenate([statistic(times) for times in _drawn(count, seed)])
    return _interval(_on_all(statistic, count), draws, tail)


def paired(ours: Statistic, theirs: Statistic, count: int, *, seed: int, tail: float = TAIL) -> Paired:
    """The same statistic for two models on the same examples. Each draw takes the same examples for both models."""
    pairs = [(ours(times), theirs(times)) for times in _drawn(count, seed)]
    mine, base = (np.concatenate(side) for side in zip(*pairs, strict=True))
    value, reference = _on_all(ours, count), _on_all(theirs, count)
    change = None
    if reference > 0:
        usable = base > 0
        change = _interval(value / reference - 1, mine[usable] / base[usable] - 1, tail)
    return Paired(_interval(value, mine, tail), change)


def expanded_tail(count: int) -> float:
    """The share of the draws beyond each end of an interval of few examples: with it, a mean's interval is as wide as Student's.

    Plain percentiles of few draws are too narrow, by √((n − 1) / n) and by the normal quantile in place of Student's t. Hesterberg, What
    Teachers Should Know About the Bootstrap (The American Statistician 69, 2015), section 5.3.
    """
    normal, freedom = NormalDist(), max(count - 1, 1)
    z = normal.inv_cdf(1 - TAIL)
    # Student's quantile by its expansion in 1 / degrees of freedom: Abramowitz and Stegun, 26.7.5.
    student = (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
    return normal.cdf(-student * math.sqrt(count / freedom))


def of_sums(columns: Array, of: Callable[[Array], Array]) -> Statistic:
    """A statistic that needs only sums over the examples. columns [N, C]: the numbers to sum; of: sums [R, C] → [R]."""
    table = np.asarray(columns, np.float64)

    def statistic(times: Array) -> Array:
        return of(times @ table)

    return statistic


def ratio(values: NDArray[Any], weights: NDArray[Any] | None = None) -> Statistic:
    """The statistic Σ values / Σ weights, e.g. agreements divided by tokens. Without weights, the mean."""
    numbers = np.asarray(values, np.float64)
    parts = np.ones_like(numbers) if weights is None else np.asarray(weights, np.float64)
    return of_sums(np.stack([numbers, parts], axis=1), lambda sums: sums[:, 0] / np.maximum(sums[:, 1], 1e-12))


def quantile(values: NDArray[Any], rows: NDArray[np.int64], share: float) -> Statistic:
    """The least value that at least a `share` of the values do not exceed; share 1: the largest.

    values [M] come from `rows` [M] of the resampled examples: a row that is drawn twice counts all its values twice.
    """
    order = np.argsort(values, kind="stable")
    ascending, row = np.asarray(values, np.float64)[order], rows[order]

    def statistic(times: Array) -> Array:
        drawn = times[:, row].cumsum(axis=1)  # [R, M]
        # Sums of whole numbers are exact. The small difference keeps share · M, which is not, from asking for one value more.
        at = (drawn < share * drawn[:, -1:] - 1e-9).sum(axis=1)
        found: Array = ascending[np.minimum(at, len(ascending) - 1)]
        return found

    return statistic


def mean_interval(values: NDArray[Any], *, seed: int, weights: NDArray[Any] | None = None) -> Interval:
    """The mean of values [N] with its interval; with `weights` [N], Σ values / Σ weights."""
    return interval(ratio(values, weights), len(values), seed=seed)


def share_interval(hits: Array, *, seed: int) -> Interval:
    """The share of hits with its interval. hits [N]: 1 for a hit, 0 for a miss."""
    return paired_shares(hits, hits, seed=seed).figure


def paired_shares(ours: Array, theirs: Array, *, seed: int) -> Paired:
    """Two models' shares of hits (1) among the same examples. ours, theirs [N].

    If all 64 examples are hits, every resample has only hits, and the interval would have no width. So two examples are added to the draws,
    but not to the figures: each model hits one of them and misses the other one. Without any miss, the result is about the rule of three.
    Compare Agresti and Min 2005, who add as much to the cells of the paired table.
    """
    value, reference = float(ours.mean()), float(theirs.mean())
    drawn = paired(ratio(np.append(ours, [1.0, 0.0])), ratio(np.append(theirs, [0.0, 1.0])), len(ours) + 2, seed=seed)
    figure = _including(drawn.figure, value)
    change = _including(drawn.change, value / reference - 1) if drawn.change and reference > 0 else None
    return Paired(figure, change)


def spread_of_draws(
    statistic: Callable[[NDArray[np.int64]], Array], count: int, *, seed: int = 0
) -> tuple[float, float]:
    """The ends of the 95% interval of a statistic that needs the drawn indices, e.g. a median. statistic: indices [R, N] → [R]."""
    drawn = statistic(np.random.default_rng(seed).integers(0, count, size=(RESAMPLES, count)))
    low, high = np.percentile(drawn, [100 * (1 - LEVEL) / 2, 100 * (1 + LEVEL) / 2])
    return float(low), float(high)


def _drawn(count: int, seed: int) -> Iterator[Array]:
    """How often each example is drawn, in blocks of resamples [R, N]. The same seed draws the same examples, so that figures are paired."""
    rng = np.random.default_rng(seed)
    step = max(1, _BLOCK // max(count, 1))
    for start in range(0, RESAMPLES, step):
        draws = rng.integers(0, count, size=(min(step, RESAMPLES - start), count))
        flat = draws + np.arange(len(draws))[:, None] * count
        yield np.bincount(flat.ravel(), minlength=len(draws) * count).reshape(len(draws), count).astype(np.float64)


def _on_all(statistic: Statistic, count: int) -> float:
    return float(statistic(np.ones((1, count)))[0])


def _interval(value: float, draws: Array, tail: float) -> Interval:
    low, high = np.percentile(draws, [100 * tail, 100 * (1 - tail)])
    # If all examples are equal, resampling gives only rounding noise. The interval must contain the value even then.
    return _including(Interval(float(value), float(low), float(high)), float(value))


def _including(interval: Interval, value: float) -> Interval:
    return Interval(value, min(interval.low, value), max(interval.high, value))
