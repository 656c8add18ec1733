"""Metrics of rerankers: does a model that scores a query with a document put the relevant documents first, and as the source does?"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nightpress.core.compress.data.pairs import read_queries
from nightpress.core.compress.data.rows import Row
from nightpress.core.compress.data.slices import Slices, slices_of
from nightpress.core.compress.data.tokenized import encode_row, pad_typed
from nightpress.core.compress.evaluate import fidelity
from nightpress.core.compress.evaluate.scores import CUT, graded_gain, kendall_tau, reciprocal_rank
from nightpress.core.compress.evaluate.statistics import Array, Statistic, ratio
from nightpress.core.compress.evaluate.view import OutputPair, ScorerRequest
from nightpress.core.compress.export.task import TokenSet
from nightpress.core.handoff.report import Measurement


@dataclass(frozen=True)
class Ranking:
    """Queries with documents. groups: for each query, the indices of its pairs among the examples; gains: their relevance, in that order."""

    examples: TokenSet
    groups: tuple[NDArray[np.int64], ...]
    gains: tuple[Array, ...]
    slices: Slices | None = None  #: of each query
    pairs: NDArray[np.bool_] | None = None  #: the examples that errors are of; None: all

    def figures(self, view: OutputPair) -> list[Measurement]:
        n = len(self.groups)

        def mean_of(score: Any) -> Any:
            def statistic(side: Any) -> Statistic:
                scores = self._scores(side)
                return ratio(np.array([score(own, gains) for own, gains in zip(scores, self.gains, strict=True)]))

            return statistic

        found = [
            view.figure("ndcg", mean_of(graded_gain), n, n=n, better="higher", unit=f"@{CUT}"),
            view.figure("mrr", mean_of(reciprocal_rank), n, n=n, better="higher", unit=f"@{CUT}"),
        ]
        return found + (self._against_source(view) if view.compares else [])

    def _against_source(self, view: OutputPair) -> list[Measurement]:
        ours, theirs, n = self._scores(view.ours), self._scores(view.theirs), len(self.groups)
        pairs = list(zip(ours, theirs, strict=True))
        taus = np.array([kendall_tau(a, b) for a, b in pairs])
        first = np.array([float(a.argmax() == b.argmax()) for a, b in pairs])
        return [
            view.resampled("kendall_tau", ratio(taus), n, n=n, better="higher"),
            view.resampled("top1_agreement", ratio(first), n, n=n, better="higher"),
            *fidelity.of_numbers(view if self.pairs is None else view.only(self.examples, self.pairs), {}),
        ]

    def part(self, view: OutputPair, units: NDArray[np.bool_]) -> list[Measurement]:
        groups = tuple(group for group, kept in zip(self.groups, units, strict=True) if kept)
        gains = tuple(gains for gains, kept in zip(self.gains, units, strict=True) if kept)
        pairs = np.zeros(len(self.examples.sequences.ids), bool)
        pairs[np.concatenate(groups)] = True
        return replace(self, groups=groups, gains=gains, pairs=pairs).figures(view)

    def _scores(self, side: Any) -> Sequence[Array]:
        """Each query's scores. Rounded: runtimes add up in different orders, and such small differences must not decide a rank."""
        scores = np.round(side("values")[:, 0].astype(np.float64), 6)
        return [scores[group] for group in self.groups]


def ranking(request: ScorerRequest) -> Ranking:
    """Read queries with documents, or make them of prose; `samples` counts queries. Raises NightpressError(invalid_data)."""
    queries = read_queries(request.source)
    chosen = [queries[at] for at in request.drawn([query.slice for query in queries])]
    rows, places = [], []
    for number, query in enumerate(chosen):
        rows += [Row(query.text, second=document) for document in query.documents]
        places += [number] * len(query.documents)
    encoded = [encode_row(row, request.tokenizer, request.wanted.length) for row in rows]
    order = np.argsort([len(ids) for ids, _ in encoded], kind="stable")  # little is computed on padding
    sequences = pad_typed([encoded[at] for at in order], request.tokenizer.pad_id, request.header)
    back = np.argsort(order, kind="stable")  # the example of each row
    numbers = np.asarray(places)
    groups = tuple(back[numbers == number].astype(np.int64) for number in range(len(chosen)))
    return Ranking(
        TokenSet(request.name, "logits", sequences),
        groups,
        tuple(np.asarray(query.gains) for query in chosen),
        slices_of(query.slice for query in chosen),
    )
