"""Pairs of texts for models that read two: a query with a document, or two sentences. Read from a data set's columns, or made from prose."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nightpress.core.compress.data.halves import half
from nightpress.core.compress.data.rows import Row
from nightpress.core.compress.data.tokenized import DataSource
from nightpress.core.recipes.labels import slice_of
from nightpress.core.recipes.textfile import invalid

#: Columns of a row with one pair, the first and the second text. A row with other columns has no pair.
_FIRST = ("query", "question", "anchor", "text_a", "sentence1", "text1")
_SECOND = ("document", "passage", "text_b", "sentence2", "text2")
_SEVERAL = ("documents", "passages", "docs")
_LABELS = ("label", "score", "relevance")
_SENTENCE = re.compile(r"(?<=[.!?;])\s+")
_CANDIDATES = 10  #: documents of a query that is made from prose


@dataclass(frozen=True)
class Query:
    """A query and the documents that are to be put in order. gains: the relevance of each document, 0 or more."""

    text: str
    documents: tuple[str, ...]
    gains: tuple[float, ...]
    slice: str | None = None  #: of its first row


def has_pairs(source: DataSource) -> bool:
    """Whether the first row has two texts: columns for one pair, several documents, or `positive` and `negative` ones."""
    return source.has(*_FIRST) and source.has(*_SECOND, *_SEVERAL, "positive")


def read_queries(source: DataSource) -> list[Query]:
    """Read rows for ranking; rows with the same query, or the same `group`, are one query. From prose: see `_from_prose`.

    A row has `query` with `document` and `label`, with `documents` and `labels`, or with `positive` and `negative` (a text or a list).
    Raises NightpressError(invalid_data) for a row without these, for a negative label, and if no query has two documents.
    """
    if source.ref.startswith("builtin:"):
        return list(_from_prose(source))
    found: dict[object, tuple[str, list[str], list[float], str | None]] = {}
    for at, record in enumerate(replace(source, part="all").records()):
        text = source.field(record, at, "text", *_FIRST)
        documents, gains = _judged(source, record, at)
        group, named = str(record.get("group", text)), slice_of(record.get("slice"))
        _, all_documents, all_gains, _ = found.setdefault(group, (text, [], [], named))
        all_documents += documents
        all_gains += gains
    queries = [Query(text, tuple(documents), tuple(gains), named) for text, documents, gains, named in found.values()]
    useful = [query for query in queries if len(query.documents) > 1 and max(query.gains) > 0]
    if len(useful) < 2:
        raise invalid(
            source.ref,
            "fewer than two of its queries have several documents, one of which is relevant",
            "Give each query several rows with `document` and `label`, or `positive` and `negative` ones.",
        )
    return half(useful, source.part, ref=source.ref)  # a query stays whole


def pair_rows(source: DataSource) -> list[Row]:
    """All pairs of a data set, with their labels where a row has one pair. Raises NightpressError(invalid_data)."""
    if source.ref.startswith("builtin:"):
        return [Row(query.text, second=text) for query in _from_prose(source) for text in query.documents[:2]]
    found = []
    for at, record in enumerate(source.records()):
        first = source.field(record, at, "text", *_FIRST)
        label = record.get("label")
        plain = label if isinstance(label, int | float | str) and not isinstance(label, bool) else None
        named = slice_of(record.get("slice"))
        found += [Row(first, plain, second, named) for second in _seconds(source, record, at)]
    return found


def _seconds(source: DataSource, record: Mapping[str, Any], at: int) -> list[str]:
    if any(record.get(name) is not None for name in _SECOND):
        return [source.field(dict(record), at, "text", *_SECOND)]
    if any(record.get(name) is not None for name in _SEVERAL):
        return list(source.field(dict(record), at, "texts", *_SEVERAL))
    negatives = source.field(dict(record), at, "texts", "negative") if record.get("negative") else []
    return [*source.field(dict(record), at, "texts", "positive"), *negatives]


def _judged(source: DataSource, record: dict[str, Any], at: int) -> tuple[list[str], list[float]]:
    """A row's documents, and the relevance of each."""
    documents = _seconds(source, record, at)
    if any(record.get(name) is not None for name in _SECOND):
        gains = [float(source.field(record, at, "number", *_LABELS))]
    elif any(record.get(name) is not None for name in _SEVERAL):
        gains = _numbers(source, source.field(record, at, "list", "labels", "scores"), at)
    else:
        positives = len(source.field(record, at, "texts", "positive"))
        gains = [1.0] * positives + [0.0] * (len(documents) - positives)
    if len(gains) != len(documents) or min(gains) < 0:
        raise invalid(
            source.ref,
            f"row {at + 1} has {len(documents)} documents and {len(gains)} labels, the least of them {min(gains):g}",
            "Give each document one label: 0 if it is not relevant, and more the more relevant it is.",
        )
    return documents, gains


def _numbers(source: DataSource, raw: Sequence[Any], at: int) -> list[float]:
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in raw):
        raise invalid(source.ref, f"row {at + 1} has `labels` that are no numbers", "Give each document a number.")
    return [float(value) for value in raw]


def _from_prose(source: DataSource) -> Iterator[Query]:
    """A paragraph's first sentence is a query, the rest of it is relevant, and the rest of nine others is not.

    Lee, Chang and Toutanova 2019 (arXiv 1906.00300), section 4.
    """
    parts = list(_split(row.text for row in source.rows()))
    if len(parts) < _CANDIDATES:
        raise invalid(source.ref, "too few of its paragraphs have two sentences", "Bring rows with `query`.")
    random = np.random.default_rng(len(parts))
    for at, (first, rest) in enumerate(parts):
        others = random.choice(len(parts) - 1, _CANDIDATES - 1, replace=False)
        documents = [rest, *(parts[other + (other >= at)][1] for other in others)]
        yield Query(first, tuple(documents), (1.0, *[0.0] * (_CANDIDATES - 1)))


def _split(texts: Iterable[str]) -> Iterator[tuple[str, str]]:
    for text in texts:
        first, *rest = _SENTENCE.split(text, maxsplit=1)
        if rest and len(first) > 40 and len(rest[0]) > 80:
            yield first, rest[0]
