"""Intervals cover as often as they claim, use the pairing of the examples, and are reproducible."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from nightpress.core.compress.evaluate.statistics import mean_interval, of_sums, paired, quantile, ratio


def against(ours: NDArray[np.float64], theirs: NDArray[np.float64]):
    return paired(ratio(ours), ratio(theirs), len(ours), seed=0)


def test_the_interval_of_a_mean_is_the_known_one():
    values = np.random.default_rng(3).normal(10, 2, size=400)
    interval = mean_interval(values, seed=0)
    error = values.std() / 20
    assert interval.value == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - 1.96 * error, abs=0.05)
    assert interval.high == pytest.approx(values.mean() + 1.96 * error, abs=0.05)


@pytest.mark.slow
def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(5)
    held = 0
    for seed in range(120):
        interval = mean_interval(rng.exponential(1.0, size=100), seed=seed)
        held += interval.low <= 1.0 <= interval.high
    assert 0.88 <= held / 120 <= 0.99


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(0).random(50)
    assert mean_interval(values, seed=7) == mean_interval(values, seed=7)
    assert mean_interval(values, seed=7) != mean_interval(values, seed=8)


def test_pairing_makes_a_constant_ratio_certain():
    """The texts' difficulty differs by a factor of ten, but each text is exactly 5% harder for the artifact: the change is certain."""
    source = np.random.default_rng(1).uniform(1, 10, size=40)
    both = against(1.05 * source, source)
    assert both.change is not None
    assert both.change.low == pytest.approx(0.05)
    assert both.change.high == pytest.approx(0.05)
    assert both.figure.high - both.figure.low > 0.5


@settings(max_examples=50)
@given(arrays(np.float64, st.integers(1, 30), elements=st.floats(0, 100)), st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_a_quantile_over_all_rows_is_numpys(values: NDArray[np.float64], share: float):
    rows = np.arange(len(values)) % 4
    statistic = quantile(values, rows, share)
    assert statistic(np.ones((1, 4)))[0] == np.quantile(values, share, method="inverted_cdf")


def test_a_row_that_is_drawn_twice_counts_twice_in_a_quantile():
    values, rows = np.array([1.0, 2.0, 9.0]), np.array([0, 0, 1])
    median = quantile(values, rows, 0.5)
    assert median(np.array([[1.0, 1.0], [0.0, 2.0], [2.0, 0.0], [1.0, 3.0]])).tolist() == [2.0, 9.0, 1.0, 9.0]


def test_perplexity_weighs_windows_by_their_tokens():
    nll = np.array([10.0, 300.0])
    tokens = np.array([10.0, 100.0])
    perplexity = of_sums(np.stack([nll, tokens], axis=1), lambda sums: np.exp(sums[:, 0] / sums[:, 1]))
    both = paired(perplexity, perplexity, 2, seed=0)
    assert both.figure.value == pytest.approx(np.exp(310 / 110))
    assert both.change is not None
    assert both.change.value == 0


def test_a_source_at_zero_has_no_relative_change():
    assert against(np.ones(5), np.zeros(5)).change is None


@settings(max_examples=50)
@given(arrays(np.float64, st.integers(2, 40), elements=st.floats(-100, 100)), st.integers(0, 2**31))
def test_the_value_lies_within_its_interval(values: NDArray[np.float64], seed: int):
    interval = mean_interval(values, seed=seed)
    assert interval.low <= interval.value <= interval.high
