"""Metrics against labels: accuracy and F1 of classifiers, entity F1 of token classifiers."""

from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from nightpress.core.compress.data import tokenized
from nightpress.core.compress.data.slices import slices_of
from nightpress.core.compress.data.tokenized import pad
from nightpress.core.compress.evaluate import fidelity
from nightpress.core.compress.evaluate.many_labels import ManyLabels, labelled, many_labels
from nightpress.core.compress.evaluate.scores import class_f1, counts_by_class, macro_f1, spans
from nightpress.core.compress.evaluate.statistics import Array, Statistic, of_sums
from nightpress.core.compress.evaluate.view import OfExamples, OutputPair, ScorerRequest
from nightpress.core.compress.export.task import TokenSet
from nightpress.core.handoff.report import Measurement

_CLASSES_SHOWN = 20


@dataclass(frozen=True)
class Classification(OfExamples):
    """Rows with their classes. F1 is the mean over classes (macro). names: index of a class → its name."""

    names: dict[int, str]

    def figures(self, view: OutputPair) -> list[Measurement]:
        labels = self.examples.sequences.labels
        assert labels is not None
        ours, theirs = view.ours("values").argmax(axis=1), view.theirs("values").argmax(axis=1)
        n = len(labels)
        found = fidelity.of_answers(view, "accuracy", ours, theirs, labels)
        classes = sorted({*labels.tolist(), *ours.tolist(), *theirs.tolist()})

        def counted(side: Any) -> Array:
            return counts_by_class(side("values").argmax(axis=1), labels, classes)

        found.append(view.figure("f1", lambda side: of_sums(counted(side), macro_f1), n, n=n, better="higher"))
        frequent = sorted(range(len(classes)), key=lambda at: -int((labels == classes[at]).sum()))[:_CLASSES_SHOWN]
        for at in sorted(frequent):
            support = int((labels == classes[at]).sum())

            def of_class(side: Any, at: int = at) -> Statistic:
                return of_sums(counted(side), lambda sums: class_f1(sums, at))

            name = self.names.get(classes[at], str(classes[at]))
            found.append(view.figure("class_f1", of_class, n, n=support, better="higher", of=name))
        return found + (fidelity.of_classes(view) if view.compares else [])


def classification(request: ScorerRequest) -> Classification | ManyLabels:
    """Read rows with `text`, or a pair of texts, and `label`: a class, or several where the model's labels are independent."""
    if request.header.head == "labels":
        return many_labels(request)
    wanted, header = request.wanted, request.header
    rows = labelled(request)
    classes = np.asarray([tokenized.class_index(row.label, header, request.ref) for row in rows], np.int64)
    sequences = tokenized.labelled_rows(
        rows, classes, request.tokenizer, header, samples=wanted.samples, length=wanted.length, seed=request.seed
    )
    examples = TokenSet(request.name, "logits", sequences, alone=header.one_text_a_batch)
    return Classification(examples, fidelity.output_names(header))


@dataclass(frozen=True)
class Entities(OfExamples):
    """Sentences with a tag for each word. An entity is correct if its type and both ends are correct, as in CoNLL-2003."""

    names: dict[int, str]
    truth: tuple[frozenset[Any], ...]  #: entities of each sentence, as (type, first word, end)

    def figures(self, view: OutputPair) -> list[Measurement]:
        targets = self.examples.sequences.targets
        assert targets is not None
        row, n = np.nonzero(targets >= 0)[0], len(targets)

        def counted(side: Any) -> Array:
            """[N, 3]: true positives, false positives and false negatives of each sentence."""
            tags = [self.names[int(label)] for label in side("top1")]
            ends = np.searchsorted(row, np.arange(n + 1))
            said = [spans(tags[ends[at] : ends[at + 1]]) for at in range(n)]
            pairs = zip(said, self.truth, strict=True)
            return np.array([[len(a & b), len(a - b), len(b - a)] for a, b in pairs], np.float64)

        entities = sum(map(len, self.truth))
        found = [
            view.figure(
                "entity_f1",
                lambda side: of_sums(counted(side), lambda sums: class_f1(sums, 0)),
                n,
                n=entities,
                better="higher",
            )
        ]
        return found + (fidelity.of_tokens(view, self.examples) if view.compares else [])

    def take(self, units: NDArray[np.bool_]) -> Self:
        truth = tuple(entities for entities, kept in zip(self.truth, units, strict=True) if kept)
        return replace(super().take(units), truth=truth)


def entities(request: ScorerRequest) -> Entities:
    """Read rows with `tokens`, a list of words, and `tags`, one for each word. A word is scored at its first token.

    Raises NightpressError(invalid_data).
    """
    names = fidelity.output_names(request.header)
    if not names:
        raise request.invalid("the model's config.json names no tags", "Give the model an `id2label`.")
    records = request.source.records()
    sequences: list[tuple[list[int], list[int]]] = []
    truth = []
    slices = request.source.slices(records)
    drawn = request.drawn(slices)
    for at in drawn:
        words = request.source.field(records[at], at, "words", "tokens", "words")
        tags = request.source.field(records[at], at, "list", "tags", "ner_tags", "labels")
        if len(words) != len(tags):
            raise request.invalid(
                f"row {at + 1} has {len(words)} words and {len(tags)} tags", "Give each word one tag; `O` for none."
            )
        classes = [tokenized.class_index(tag, request.header, request.ref) for tag in tags]
        ids, targets, kept = _pieces(request, words, classes)
        sequences.append((ids, targets))
        truth.append(frozenset(spans([names[label] for label in classes[:kept]])))
    padded = pad([ids for ids, _ in sequences], request.tokenizer.pad_id)
    scored = np.full_like(padded.ids, -1)
    for at, (_, sequence) in enumerate(sequences):
        scored[at, : len(sequence)] = sequence
    if not (scored >= 0).any():
        raise request.invalid("none of its rows has a word", "Bring rows with words and tags.")
    whole = replace(padded, targets=scored, slices=slices_of(slices[at] for at in drawn))
    return Entities(fidelity.token_set(request.name, whole, request.header.classes), names, tuple(truth))


def _pieces(request: ScorerRequest, words: list[str], classes: list[int]) -> tuple[list[int], list[int], int]:
    """Token ids, the class at each word's first token (elsewhere −1), and the number of words that fit into `length`."""
    before, after = tokenized.special_tokens(request.tokenizer)
    ids, targets = list(before), [-1] * len(before)
    room = request.wanted.length - len(after)
    for at, (word, cls) in enumerate(zip(words, classes, strict=True)):
        pieces = request.tokenizer.encode(f" {word}" if at else word, special=False) or [request.tokenizer.pad_id]
        if len(ids) + len(pieces) > room:
            return [*ids, *after], targets + [-1] * len(after), at
        ids += pieces
        targets += [cls] + [-1] * (len(pieces) - 1)
    return [*ids, *after], targets + [-1] * len(after), len(words)
