"""Does an embedder's vector find the texts that the source's whole vector finds, also when it is truncated or stored in fewer bits?"""

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nightpress.core.compress.data import tokenized
from nightpress.core.compress.data.slices import Slices, slices_of
from nightpress.core.compress.evaluate import fidelity
from nightpress.core.compress.evaluate.scores import CUT
from nightpress.core.compress.evaluate.statistics import Array, Statistic, ratio
from nightpress.core.compress.evaluate.vectors import similarities, used_vectors
from nightpress.core.compress.evaluate.view import OutputPair, ScorerRequest
from nightpress.core.compress.export.task import TokenSet
from nightpress.core.handoff.report import Measurement
from nightpress.core.recipes.models import VectorType
from nightpress.core.recipes.sentence import EmbedderUse


@dataclass(frozen=True)
class Neighbours:
    """Texts, each of which looks for its nearest among the others. forms: (dimensions or None for all, number type) of the vectors."""

    examples: TokenSet
    forms: tuple[tuple[int | None, VectorType], ...]
    use: EmbedderUse
    asking: NDArray[np.bool_] | None = None  #: [N], the texts that look for others among all; None: all

    def figures(self, view: OutputPair) -> list[Measurement]:
        whole = used_vectors(view.theirs("values"), self.use, None)
        expected = _nearest(similarities(whole, whole, self.use.similarity))
        asking = np.ones(len(expected), bool) if self.asking is None else self.asking
        n, found = int(asking.sum()), []
        for dimensions, kind in self.forms:

            def recalled(side: Any, dimensions: int | None = dimensions, kind: VectorType = kind) -> Statistic:
                vectors = view.vectors(side, self.use)[:, :dimensions]
                nearest = _nearest(stored_similarities(vectors, kind, self.use))
                pairs = zip(nearest[asking], expected[asking], strict=True)
                return ratio(np.array([np.isin(a, b).mean() for a, b in pairs]))

            of = " × ".join(
                [*([] if dimensions is None else [str(dimensions)]), *([kind] if len(self.forms) > 1 else [])]
            )
            found.append(view.figure("neighbour_recall", recalled, n, n=n, better="higher", unit=f"@{CUT}", of=of))
        return found + (fidelity.of_vectors(view.only(self.examples, asking)) if view.compares else [])

    @property
    def slices(self) -> Slices | None:
        return self.examples.sequences.slices

    def part(self, view: OutputPair, units: NDArray[np.bool_]) -> list[Measurement]:
        return replace(self, asking=units).figures(view)


def neighbours(request: ScorerRequest) -> Neighbours:
    """Read texts, one a row or paragraph. Raises NightpressError(invalid_data) if there are hardly more than the neighbours that are counted."""
    wanted, use = request.wanted, request.header.use
    rows = request.source.rows()
    chosen = [rows[at] for at in request.drawn([row.slice for row in rows])]
    if len(chosen) < 3 * CUT:
        raise request.invalid(
            f"{len(chosen)} texts are too few to look for {CUT} neighbours among", f"Use at least {3 * CUT} `samples`."
        )
    encoded = [
        tokenized.cut(request.tokenizer.encode(use.text_prompt + row.text, special=True), wanted.length)
        for row in chosen
    ]
    slices = slices_of(row.slice for row in chosen)
    sequences = replace(tokenized.pad(encoded, request.tokenizer.pad_id), slices=slices)
    forms = tuple(product((None, *wanted.dimensions), wanted.types))
    return Neighbours(TokenSet(request.name, "pooled", sequences), forms, use)


def stored_similarities(vectors: Array, kind: VectorType, use: EmbedderUse) -> Array:
    """The similarity of every two of the vectors [N, D], as stored in a number type, without rescoring: [N, N].

    int8: 256 steps between each dimension's extremes, as sentence-transformers' `quantize_embeddings`. binary: the signs, compared by the
    number of equal bits.
    """
    if kind == "binary":
        signs = np.where(vectors > 0, 1.0, -1.0)
        result: Array = signs @ signs.T
        return result
    if kind == "int8":
        low, high = vectors.min(axis=0), vectors.max(axis=0)
        step = np.maximum(high - low, 1e-30) / 255
        vectors = low + step * np.round((vectors - low) / step)
    return similarities(vectors, vectors, use.similarity)


def _nearest(near: Array) -> NDArray[np.int64]:
    """The `CUT` nearest other texts of each text, [N, CUT]. Rounded: runtimes add up in different orders."""
    rounded = np.round(near, 9)
    np.fill_diagonal(rounded, -np.inf)
    return np.argsort(-rounded, axis=1, kind="stable")[:, :CUT]
