"""Each score equals its textbook value. Resampling a score equals computing it on the resampled examples."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nightpress.core.compress.evaluate.scores import (
    class_f1,
    counts_by_class,
    macro_f1,
    pearson,
    ranking_scores,
    spans,
    spearman,
)
from nightpress.core.compress.evaluate.statistics import Statistic, of_sums, paired, paired_shares

RNG = np.random.default_rng(4)


def once(statistic: Statistic, times: Sequence[int] | NDArray[Any]) -> float:
    return float(statistic(np.asarray(times, float)[None])[0])


def test_macro_f1_is_the_mean_over_classes():
    labels = np.array([0, 0, 0, 1, 1, 2])
    said = np.array([0, 0, 1, 1, 0, 2])
    counts = counts_by_class(said, labels, [0, 1, 2]).sum(axis=0, keepdims=True)
    # (hits, false positives, misses): class 0 has (2, 1, 1), class 1 has (1, 1, 1), class 2 has (1, 0, 0)
    assert class_f1(counts, 0)[0] == pytest.approx(4 / 6)
    assert class_f1(counts, 1)[0] == pytest.approx(2 / 4)
    assert macro_f1(counts)[0] == pytest.approx((4 / 6 + 2 / 4 + 1) / 3)


def test_a_class_that_was_not_drawn_does_not_lower_f1():
    counts = counts_by_class(np.array([0, 1]), np.array([0, 1]), [0, 1])
    assert once(of_sums(counts, macro_f1), [2, 0]) == 1


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        (["B-PER", "I-PER", "O", "B-LOC"], {("PER", 0, 2), ("LOC", 3, 4)}),
        (["B-PER", "B-PER"], {("PER", 0, 1), ("PER", 1, 2)}),
        (["I-PER", "I-LOC"], {("PER", 0, 1), ("LOC", 1, 2)}),
        (["S-PER", "B-LOC", "E-LOC", "I-LOC"], {("PER", 0, 1), ("LOC", 1, 3), ("LOC", 3, 4)}),
        (["NOUN", "NOUN", "O", "VERB"], {("NOUN", 0, 2), ("VERB", 3, 4)}),
        (["O", "O"], set()),
        ([], set()),
    ],
)
def test_entities_are_read_from_their_tags(tags: list[str], expected: set[object]):
    assert spans(tags) == expected


def test_spearman_shares_ranks_among_ties():
    # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4
    x, y = np.array([1.0, 5, 5, 9]), np.array([1.0, 2, 3, 4])
    assert once(spearman(x, y), np.ones(4)) == pytest.approx(np.corrcoef([1, 2.5, 2.5, 4], [1, 2, 3, 4])[0, 1])


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.integers(3, 30))
@example(3596, 3)  # draws one pair three times
def test_a_drawn_correlation_is_that_of_the_drawn_pairs(seed: int, count: int):
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 6, count).astype(float), rng.normal(size=count)
    drawn = rng.integers(0, count, count)
    times = np.bincount(drawn, minlength=count)
    for statistic, expected in ((spearman, _rank_correlation), (pearson, _correlation)):
        assert once(statistic(x, y), times) == pytest.approx(expected(x[drawn], y[drawn]), abs=1e-6)


def _correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    return 0.0 if np.ptp(x) == 0 or np.ptp(y) == 0 else np.corrcoef(x, y)[0, 1]


def _rank_correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    def ranks(v: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.array([(v < x).sum() + ((v == x).sum() + 1) / 2 for x in v])

    return _correlation(ranks(x), ranks(y))


def test_ranking_counts_where_the_relevant_passages_stand():
    similarity = np.array([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1]])
    relevant = np.array([[False, True, False], [True, False, True]])
    gain, recall = ranking_scores(similarity, relevant, cut=2)
    assert gain == pytest.approx([1 / np.log2(3), 1 / (1 + 1 / np.log2(3))])
    assert recall == pytest.approx([1, 0.5])


def test_sixty_four_right_answers_prove_no_perfection():
    """The rule of three: after n examples without a miss, the miss rate may still be 3/n."""
    perfect = paired_shares(np.ones(64), np.ones(64), seed=0)
    assert perfect.figure.value == 1
    assert 1 - 5 / 64 < perfect.figure.low < 1 - 2 / 64
    assert perfect.change is not None
    assert perfect.change.value == 0
    assert perfect.change.low < -1 / 64
    assert perfect.change.high > 1 / 64


def test_draws_are_paired():
    values = RNG.uniform(1, 9, 30)
    both = paired(
        of_sums(values[:, None], lambda s: 2 * s[:, 0]), of_sums(values[:, None], lambda s: s[:, 0]), 30, seed=1
    )
    assert both.change is not None
    assert (both.change.low, both.change.high) == (pytest.approx(1.0), pytest.approx(1.0))
