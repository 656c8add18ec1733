"""Altered texts, for which a teacher answers: few texts of a user become many from which a student learns.

As Tang et al. 2019 (arXiv 1903.12136), section 3.3, make them for distillation: tokens are masked or replaced, and parts are taken. TinyBERT
(arXiv 1909.10351) shows that a small classifier gains more from such texts than from anything else. Nothing here needs another model.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nightpress.core.compress.data.examples import UNLABELLED, Examples

_MASKED = 0.1  #: probability that a token of an altered text is hidden behind the mask token
_REPLACED = 0.1  #: probability that it becomes another token of the data
_PART = 0.25  #: probability that only a part of the text stays
_JOINED = 0.25  #: probability that the text's end is replaced by another text's end
_FEWEST = 4  #: tokens of a text of which parts are taken


@dataclass(frozen=True)
class Alterations:
    """How texts are altered. share: fraction of the texts; special: ids that stay where they are; mask_id: None if there is no mask token."""

    share: float
    special: frozenset[int]
    mask_id: int | None

    def of(self, examples: Examples, *, seed: tuple[int, ...]) -> Examples:
        """Return as many examples, with a share of them altered and unlabelled. The seed decides which, and how.

        Pairs keep their lengths: what belongs to which text must stay known.
        """
        random = np.random.default_rng(seed)
        every = np.concatenate(examples.ids)
        stays = np.zeros(int(every.max()) + 1, bool)
        stays[[token for token in self.special if token < len(stays)]] = True
        drawn = every[~stays[every]]
        chosen = np.flatnonzero(random.random(len(examples)) < self.share)
        if not len(drawn):
            return examples
        longest = max(len(row) for row in examples.ids)
        ids = list(examples.ids)
        for at, other in zip(chosen, random.integers(len(ids), size=len(chosen)), strict=True):
            row = _reshaped(examples.ids[at], examples.ids[other], stays, longest, random)
            ids[at] = self._with_other_tokens(row, stays, drawn, random)
        labels = examples.labels
        if labels is not None:
            labels = labels.copy()
            labels[chosen] = UNLABELLED
        return replace(examples, ids=tuple(ids), labels=labels)

    def _with_other_tokens(
        self, row: NDArray[np.int64], stays: NDArray[np.bool_], drawn: NDArray[np.int64], random: np.random.Generator
    ) -> NDArray[np.int64]:
        fate = random.random(len(row))
        fate[stays[row]] = 1.0
        found = np.where(fate < _REPLACED, drawn[random.integers(len(drawn), size=len(row))], row)
        if self.mask_id is not None:
            found[(fate >= _REPLACED) & (fate < _REPLACED + _MASKED)] = self.mask_id
        return found


def _reshaped(
    row: NDArray[np.int64],
    other: NDArray[np.int64],
    stays: NDArray[np.bool_],
    longest: int,
    random: np.random.Generator,
) -> NDArray[np.int64]:
    """A part of the text, or its beginning with another's end, between its own special tokens; or the text as it is."""
    fate, ours, theirs = random.random(), _body(row, stays), _body(other, stays)
    if fate >= _PART + _JOINED or ours is None or theirs is None:
        return row
    before, text, after = row[: ours.start], row[ours], row[ours.stop :]
    if fate < _PART:
        length = int(random.integers(1, len(text) + 1))
        start = int(random.integers(len(text) - length + 1))
        return np.concatenate([before, text[start : start + length], after])
    end = other[theirs]
    joined = [text[: random.integers(1, len(text) + 1)], end[random.integers(len(end)) :]]
    room = longest - len(before) - len(after)
    return np.concatenate([before, np.concatenate(joined)[:room], after])


def _body(row: NDArray[np.int64], stays: NDArray[np.bool_]) -> slice | None:
    """Where the text is, without the special tokens around it. None: it is too short, or special tokens divide it, as those of a pair do."""
    free = np.flatnonzero(~stays[row])
    if len(free) < _FEWEST or free[-1] - free[0] != len(free) - 1:
        return None
    return slice(int(free[0]), int(free[-1]) + 1)
