"""A sample of tokens that doesn't depend on how the tokens are divided into batches."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nightpress.core.compress.solvers.samples import EvenSample


@given(st.lists(st.integers(0, 900), min_size=1, max_size=12))
def test_the_same_tokens_in_any_batches_leave_the_same_sample(sizes: list[int]):
    tokens = torch.arange(float(sum(sizes)))[:, None]
    whole, split = EvenSample(), EvenSample()
    whole.add(tokens)
    for batch in tokens.split(sizes):
        split.add(batch)
    assert torch.equal(whole.tokens(), split.tokens())


@pytest.mark.parametrize("count", [1, 1023, 1024, 1025, 2049, 100_000])
def test_it_is_spread_evenly_and_bounded(count: int):
    sample = EvenSample()
    for batch in torch.arange(float(count))[:, None].split(777):
        sample.add(batch)
    kept = sample.tokens()[:, 0]
    assert min(count, 512) <= len(kept) <= 1024
    assert len(set(kept.diff().tolist())) <= 1
    assert kept[0] == 0
