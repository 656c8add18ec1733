"""Scores that are not plain means, as statistics for the bootstrap: functions of how often each example was drawn.

The functions work on arrays of numbers, without any model or file.
"""

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from nightpress.core.compress.evaluate.statistics import Array, Statistic, of_sums

Classes = NDArray[np.int64]
CUT = 10  #: nDCG and recall count the first 10 ranks
_ROUNDING = 1e-12  #: relative rounding of a sum

# Classification ------------------------------------------------------------------------------------------------------


def counts_by_class(predicted: Classes, labels: Classes, classes: Sequence[int]) -> Array:
    """For each example and class: true positive, false positive, false negative (1 or 0). predicted, labels [N] → [N, 3 · C]."""
    said = predicted[:, None] == np.asarray(classes)
    true = labels[:, None] == np.asarray(classes)
    return np.concatenate([said & true, said & ~true, ~said & true], axis=1).astype(np.float64)


def macro_f1(sums: Array) -> Array:
    """F1 averaged over the classes that were drawn or predicted: sums of `counts_by_class` [R, 3 · C] → [R]."""
    hit, claimed, missed = np.split(sums, 3, axis=1)
    seen = 2 * hit + claimed + missed
    scores = 2 * hit / np.maximum(seen, 1e-12)
    result: Array = scores.sum(axis=1) / np.maximum((seen > 0).sum(axis=1), 1)
    return result


def class_f1(sums: Array, at: int) -> Array:
    """F1 of one class: sums of `counts_by_class` [R, 3 · C] → [R]. It is 0 where the class was neither drawn nor predicted."""
    hit, claimed, missed = (part[:, at] for part in np.split(sums, 3, axis=1))
    result: Array = 2 * hit / np.maximum(2 * hit + claimed + missed, 1e-12)
    return result


def spans(tags: Sequence[str]) -> set[Hashable]:
    """Entities as (type, first word, end). Reads IOB2, IOBES and plain tags, where a run of equal tags is an entity.

    A continuing tag (`I-`) without an entity before it begins a new entity, as in the CoNLL-2000 script.
    """
    found: set[Hashable] = set()
    kind, start = "", 0
    for at, tag in enumerate([*tags, "O"]):
        prefix, dash, rest = tag.partition("-")
        marked = bool(dash) and prefix in {"B", "I", "E", "S", "L", "U"}
        now = "" if tag == "O" else rest if marked else tag
        begins = now != kind or (marked and prefix in {"B", "S", "U"})
        if begins and kind:
            found.add((kind, start, at))
        if begins:
            start = at
        kind = now
        if marked and prefix in {"E", "S", "L", "U"}:
            found.add((kind, start, at + 1))
            kind = ""
    return found


# Correlation ---------------------------------------------------------------------------------------------------------


def pearson(x: Array, y: Array) -> Statistic:
    """Pearson's correlation of x and y, [N] each."""
    # Centred first: sums of squares of numbers far from zero would lose their small differences to rounding.
    a, b = x - x.mean(), y - y.mean()
    return of_sums(np.stack([np.ones_like(a), a, b, a * a, b * b, a * b], axis=1), _correlation)


def _correlation(sums: Array) -> Array:
    n, a, b, aa, bb, ab = sums.T
    spread = _spread(n * aa, a * a) * _spread(n * bb, b * b)
    result: Array = np.where(spread > 0, (n * ab - a * b) / np.sqrt(np.maximum(spread, 1e-300)), 0.0)
    return np.clip(result, -1, 1)


def _spread(whole: Array, part: Array) -> Array:
    """The difference, or 0 if it is only the rounding of both: a draw may hold one value alone."""
    difference = whole - part
    return np.where(difference > _ROUNDING * whole, difference, 0.0)


def spearman(x: Array, y: Array) -> Statistic:
    """Spearman's rank correlation of x and y, [N] each: Pearson's correlation of the ranks.

    Ties get the mean of their ranks. Every draw of the bootstrap has ranks of its own.
    """
    ranks_x, ranks_y = _ranks(x), _ranks(y)

    def statistic(times: Array) -> Array:
        a, b = ranks_x(times), ranks_y(times)
        n = times.sum(axis=1, keepdims=True)
        a, b = a - (times * a).sum(axis=1, keepdims=True) / n, b - (times * b).sum(axis=1, keepdims=True) / n
        spread = (times * a * a).sum(axis=1) * (times * b * b).sum(axis=1)
        together: Array = (times * a * b).sum(axis=1)
        return np.where(spread > 0, together / np.sqrt(np.maximum(spread, 1e-300)), 0.0)

    return statistic


def _ranks(values: Array) -> Callable[[Array], Array]:
    """A function that maps how often each value was drawn [R, N] to the rank of each value in that draw [R, N]."""
    _, group = np.unique(values, return_inverse=True)
    first = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[first], np.arange(group.max() + 1))

    def ranks(times: Array) -> Array:
        drawn = np.add.reduceat(times[:, first], starts, axis=1)  # [R, G], draws of each distinct value
        below = np.cumsum(drawn, axis=1) - drawn
        result: Array = (below + (drawn + 1) / 2)[:, group]
        return result

    return ranks


# Retrieval -----------------------------------------------------------------------------------------------------------


def ranking_scores(similarity: Array, relevant: NDArray[np.bool_], cut: int = CUT) -> tuple[Array, Array]:
    """nDCG and recall among the first `cut` passages: two arrays [Q].

    similarity, relevant [Q, P]; each query needs a relevant passage. Passages of equal similarity keep their order, so that the result does
    not depend on the sort. Järvelin and Kekäläinen 2002, with gains of 0 and 1.
    """
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :cut]
    gains = np.take_along_axis(relevant, order, axis=1).astype(np.float64)
    discounts = 1 / np.log2(np.arange(2, gains.shape[1] + 2))
    total = relevant.sum(axis=1)
    ideal = np.cumsum(discounts)[np.minimum(total, gains.shape[1]) - 1]
    return (gains @ discounts) / ideal, gains.sum(axis=1) / total


def graded_gain(scores: Array, gains: Array, cut: int = CUT) -> float:
    """nDCG among the first `cut` documents of one query. scores, gains [D]; some gain is positive.

    Gains count as they are. Documents of equal score keep their order. Järvelin and Kekäläinen 2002.
    """
    discounts = 1 / np.log2(np.arange(2, min(cut, len(gains)) + 2))
    ranked = gains[np.argsort(-scores, kind="stable")][: len(discounts)]
    ideal = np.sort(gains)[::-1][: len(discounts)]
    return float((ranked @ discounts) / (ideal @ discounts))


def reciprocal_rank(scores: Array, gains: Array, cut: int = CUT) -> float:
    """1 / the rank of the first relevant document of one query; 0 if it is not among the first `cut`. scores, gains [D]."""
    relevant = np.flatnonzero(gains[np.argsort(-scores, kind="stable")][:cut] > 0)
    return 1 / (1 + int(relevant[0])) if len(relevant) else 0.0


def kendall_tau(a: Array, b: Array) -> float:
    """Kendall's τ-b of two orders [D]: 1 the same, −1 reversed; ties count as half. 1 if both have no order at all, 0 if one has none."""
    upper: tuple[NDArray[np.int64], ...] = np.triu_indices(len(a), 1)
    x, y = (np.sign(values[:, None] - values[None])[upper] for values in (a, b))
    spread = math.sqrt(float((x * x).sum() * (y * y).sum()))
    if spread > 0:
        return float((x * y).sum()) / spread
    return float(not (x.any() or y.any()))
