"""Metrics of embedding models: do similar texts get similar vectors (similarity), and does a query find its passages (retrieval)?"""

import re
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nightpress.core.compress.data import tokenized
from nightpress.core.compress.data.slices import Slices, slices_of
from nightpress.core.compress.evaluate import fidelity
from nightpress.core.compress.evaluate.scores import CUT, pearson, ranking_scores, spearman
from nightpress.core.compress.evaluate.statistics import Array, Statistic, ratio
from nightpress.core.compress.evaluate.vectors import pair_similarities, similarities
from nightpress.core.compress.evaluate.view import OutputPair, ScorerRequest
from nightpress.core.compress.export.task import TokenSet
from nightpress.core.handoff.report import Measurement
from nightpress.core.recipes.sentence import EmbedderUse

_SENTENCE = re.compile(r"(?<=[.!?;])\s+")


@dataclass(frozen=True)
class Similarity:
    """Pairs of texts with human scores. pairs [N, 2]: indices of the examples; scores [N]."""

    examples: TokenSet
    pairs: NDArray[np.int64]
    scores: Array
    use: EmbedderUse = field(default_factory=EmbedderUse)
    slices: Slices | None = None  #: of each pair
    texts: NDArray[np.bool_] | None = None  #: the examples that fidelity is of; None: all

    def figures(self, view: OutputPair) -> list[Measurement]:
        n = len(self.scores)

        def cosines(side: Any) -> Array:
            vectors = view.vectors(side, self.use)
            return pair_similarities(vectors[self.pairs[:, 0]], vectors[self.pairs[:, 1]], self.use.similarity)

        def by_ranks(side: Any) -> Statistic:
            return spearman(cosines(side), self.scores)

        def by_values(side: Any) -> Statistic:
            return pearson(cosines(side), self.scores)

        found = [
            view.figure("spearman", by_ranks, n, n=n, better="higher"),
            view.figure("pearson", by_values, n, n=n, better="higher"),
        ]
        return found + _fidelity(view, self.examples, self.texts)

    def part(self, view: OutputPair, units: NDArray[np.bool_]) -> list[Measurement]:
        pairs = self.pairs[units]
        texts = _marked(self.examples, pairs)
        return replace(self, pairs=pairs, scores=self.scores[units], texts=texts).figures(view)


def similarity(request: ScorerRequest) -> Similarity:
    """Read rows with two texts and a `score`. Raises NightpressError(invalid_data) if all scores are equal."""
    records, use = request.source.records(), request.header.use
    texts = _Texts()
    pairs, scores = [], []
    slices = request.source.slices(records)
    drawn = request.drawn(slices)
    for at in drawn:
        row, source = records[at], request.source
        first = source.field(row, at, "text", "text_a", "sentence1", "text1")
        second = source.field(row, at, "text", "text_b", "sentence2", "text2")
        pairs.append((texts.place(use.text_prompt + first), texts.place(use.text_prompt + second)))
        scores.append(float(source.field(row, at, "number", "score", "similarity_score", "label")))
    if min(scores) == max(scores):
        raise request.invalid(
            "all its pairs have the same score: nothing correlates with that", "Bring pairs whose scores differ."
        )
    return Similarity(
        texts.examples(request),
        np.asarray(pairs, np.int64),
        np.asarray(scores, np.float64),
        use,
        slices_of(slices[at] for at in drawn),
    )


@dataclass(frozen=True)
class Retrieval:
    """Queries, each of which should find its passages among all passages.

    queries [Q], passages [P]: indices of the examples. relevant [Q, P]: whether the passage belongs to the query.
    """

    examples: TokenSet
    queries: NDArray[np.int64]
    passages: NDArray[np.int64]
    relevant: NDArray[np.bool_]
    use: EmbedderUse = field(default_factory=EmbedderUse)
    slices: Slices | None = None  #: of each query
    texts: NDArray[np.bool_] | None = None  #: the examples that fidelity is of; None: all

    def figures(self, view: OutputPair) -> list[Measurement]:
        n = len(self.queries)

        def scored(side: Any) -> tuple[Array, Array]:
            vectors = view.vectors(side, self.use)
            near = similarities(vectors[self.queries], vectors[self.passages], self.use.similarity)
            # Rounded: runtimes add up in different orders, and such small differences must not decide a rank.
            return ranking_scores(np.round(near, 9), self.relevant)

        def gain(side: Any) -> Statistic:
            return ratio(scored(side)[0])

        def recalled(side: Any) -> Statistic:
            return ratio(scored(side)[1])

        found = [
            view.figure("ndcg", gain, n, n=n, better="higher", unit=f"@{CUT}"),
            view.figure("recall", recalled, n, n=n, better="higher", unit=f"@{CUT}"),
        ]
        return found + _fidelity(view, self.examples, self.texts)

    def part(self, view: OutputPair, units: NDArray[np.bool_]) -> list[Measurement]:
        """The queries of a slice look among all passages."""
        queries, relevant = self.queries[units], self.relevant[units]
        texts = _marked(self.examples, queries, self.passages[relevant.any(axis=0)])
        return replace(self, queries=queries, relevant=relevant, texts=texts).figures(view)


def retrieval(request: ScorerRequest) -> Retrieval:
    """Read rows with `query`, `positive` and perhaps `negative`. In prose, a paragraph's first sentence has to find its other sentences.

    Raises NightpressError(invalid_data) if there are fewer than two passages.
    """
    triples = _inverse_cloze(request) if request.ref.startswith("builtin:") else _triples(request)
    use = request.header.use
    texts = _Texts()
    places: dict[int, int] = {}
    queries, wanted = [], []
    for query, positives, negatives, _ in triples:
        queries.append(texts.place(use.query_prompt + query))
        found = [places.setdefault(texts.place(use.document_prompt + text), len(places)) for text in positives]
        for negative in negatives:
            places.setdefault(texts.place(use.document_prompt + negative), len(places))
        wanted.append(found)
    relevant = np.zeros((len(queries), len(places)), bool)
    for at, own in enumerate(wanted):
        relevant[at, own] = True
    if len(places) < 2:
        raise request.invalid("all its queries share one passage", "Bring more passages, or `negative` ones.")
    return Retrieval(
        texts.examples(request),
        np.asarray(queries, np.int64),
        np.fromiter(places, np.int64),
        relevant,
        use,
        slices_of(name for *_, name in triples),
    )


def _fidelity(view: OutputPair, examples: TokenSet, texts: NDArray[np.bool_] | None) -> list[Measurement]:
    """How close the vectors of some of the examples are to the source's. texts [N]; None: of all."""
    if not view.compares:
        return []
    return fidelity.of_vectors(view if texts is None else view.only(examples, texts))


def _marked(examples: TokenSet, *places: NDArray[np.int64]) -> NDArray[np.bool_]:
    """A mask [N] of the examples at these indices."""
    marked = np.zeros(len(examples.sequences.ids), bool)
    for indices in places:
        marked[indices.ravel()] = True
    return marked


_Triple = tuple[str, list[str], list[str], str | None]  #: query, positive passages, negative ones, slice


def _triples(request: ScorerRequest) -> list[_Triple]:
    records, source = request.source.records(), request.source
    found, slices = [], source.slices(records)
    for at in request.drawn(slices):
        row = records[at]
        query = source.field(row, at, "text", "query", "anchor", "question")
        positive = source.field(row, at, "texts", "positive", "passage", "answer")
        negative = (
            source.field(row, at, "texts", "negative", "negatives")
            if row.get("negative") or row.get("negatives")
            else []
        )
        found.append((query, positive, negative, slices[at]))
    return found


def _inverse_cloze(request: ScorerRequest) -> list[_Triple]:
    """Pairs without labels: a paragraph's first sentence is the query, the rest is its passage.

    Lee, Chang and Toutanova 2019 (arXiv 1906.00300), section 4.
    """
    found: list[_Triple] = []
    for row in request.source.rows():
        first, *rest = _SENTENCE.split(row.text, maxsplit=1)
        if rest and len(first) > 40 and len(rest[0]) > 80:
            found.append((first, rest, [], None))
    if len(found) < 2:
        raise request.invalid("too few of its paragraphs have two sentences", "Bring rows with `query` and `positive`.")
    return [found[at] for at in request.drawn([None] * len(found))]


class _Texts:
    """A set of distinct texts, so that each text is embedded only once."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}

    def place(self, text: str) -> int:
        return self._places.setdefault(text, len(self._places))

    def examples(self, request: ScorerRequest) -> TokenSet:
        length = request.wanted.length
        encoded = [tokenized.cut(request.tokenizer.encode(text, special=True), length) for text in self._places]
        return TokenSet(request.name, "pooled", tokenized.pad(encoded, request.tokenizer.pad_id))
