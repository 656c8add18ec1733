"""The figures of each slice of an evaluation's data, so that a part that loses more than the rest doesn't hide in the whole."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from nightpress.core.compress.evaluate.view import FEWEST, OutputPair, Scorer, without_interval
from nightpress.core.handoff.report import RANKED_BY, Slice

SHOWN = 32  #: of more slices, those with the most examples


def by_slice(scorer: Scorer, view: OutputPair) -> list[Slice]:
    """The figures of each slice; [] if the data has no slices. A slice with a single example has no figures."""
    names = scorer.slices or ()
    counts = Counter(name for name in names if name is not None)
    return [_slice(scorer, view, name, names) for name, _ in counts.most_common(SHOWN)]


def _slice(scorer: Scorer, view: OutputPair, name: str, names: tuple[str | None, ...]) -> Slice:
    units = np.asarray([other == name for other in names])
    count = int(units.sum())
    found = scorer.part(replace(view, sliced=True), units) if count > 1 else []
    if count < FEWEST:
        found = [without_interval(figure) for figure in found]
    return Slice(name=name, data=view.ref, examples=count, measurements=tuple(found))


def worst_first(slices: Iterable[Slice]) -> list[Slice]:
    """Slices by how far they are from the source, the farthest first, by the first figure of RANKED_BY that each has."""

    def place(part: Slice) -> tuple[int, float]:
        figure = part.ranked
        if figure is None:
            return len(RANKED_BY), 0.0
        return RANKED_BY.index(figure.name), figure.value if figure.better == "higher" else -figure.value

    return sorted(slices, key=place)
