"""Altered texts for a teacher: what is kept, what changes, and that the seed decides."""

import numpy as np

from nightpress.core.compress.data.alterations import Alterations
from nightpress.core.compress.data.examples import UNLABELLED, Examples

_CLS, _SEP, _MASK = 101, 102, 103
_ALTERATIONS = Alterations(0.5, frozenset({_CLS, _SEP}), _MASK)


def _texts(count: int, length: int = 20) -> Examples:
    random = np.random.default_rng(0)
    rows = [np.concatenate([[_CLS], random.integers(1000, 2000, length), [_SEP]]) for _ in range(count)]
    return Examples(tuple(rows), np.arange(count) % 2, 0, np.arange(count))


def _changed(before: Examples, after: Examples) -> list[int]:
    pairs = zip(before.ids, after.ids, strict=True)
    return [at for at, (old, new) in enumerate(pairs) if not np.array_equal(old, new)]


def test_a_share_of_the_texts_is_altered_and_has_no_label_then():
    texts = _texts(400)
    altered = _ALTERATIONS.of(texts, seed=(1, 2))
    assert altered.labels is not None
    assert texts.labels is not None
    unlabelled = np.flatnonzero(altered.labels == UNLABELLED)
    assert 150 < len(unlabelled) < 250
    assert set(_changed(texts, altered)) <= set(unlabelled.tolist())
    assert len(_changed(texts, altered)) > 0.9 * len(unlabelled)
    kept = altered.labels != UNLABELLED
    assert np.array_equal(altered.labels[kept], texts.labels[kept])
    assert (texts.labels != UNLABELLED).all()


def test_altered_texts_keep_their_special_tokens_and_grow_no_longer_than_the_longest():
    altered = _ALTERATIONS.of(_texts(400), seed=(1, 2))
    for row in altered.ids:
        assert row[0] == _CLS
        assert row[-1] == _SEP
        assert not np.isin(row[1:-1], [_CLS, _SEP]).any()
        assert 3 <= len(row) <= 22
    whole = np.concatenate(altered.ids)
    assert (whole == _MASK).any()
    assert len({len(row) for row in altered.ids}) > 5


def test_the_seed_decides():
    texts = _texts(50)
    first, again, other = (_ALTERATIONS.of(texts, seed=(0, epoch)) for epoch in (3, 3, 4))
    assert not _changed(first, again)
    assert _changed(first, other)


def test_pairs_keep_their_lengths_and_separators():
    pair = np.concatenate([[_CLS], np.arange(1000, 1010), [_SEP], np.arange(1100, 1120), [_SEP]])
    kinds = np.repeat([0, 1], [12, 21])
    pairs = Examples((pair,) * 100, None, 0, np.arange(100), (kinds,) * 100)
    altered = Alterations(1.0, frozenset({_CLS, _SEP}), _MASK).of(pairs, seed=(0, 0))
    assert len(_changed(pairs, altered)) > 90
    for row in altered.ids:
        assert len(row) == len(pair)
        assert np.array_equal(np.flatnonzero(np.isin(row, [_CLS, _SEP])), [0, 11, 32])


def test_without_a_mask_token_words_are_only_replaced():
    altered = Alterations(1.0, frozenset({_CLS, _SEP}), None).of(_texts(100), seed=(0, 0))
    assert not (np.concatenate(altered.ids) == _MASK).any()
