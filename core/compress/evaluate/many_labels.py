"""Metrics against the labels of classifiers that don't choose one class: several labels that each hold or don't, and numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nightpress.core.compress.data import tokenized
from nightpress.core.compress.data.pairs import has_pairs, pair_rows
from nightpress.core.compress.data.rows import Row
from nightpress.core.compress.evaluate import fidelity
from nightpress.core.compress.evaluate.scores import class_f1, macro_f1, pearson, spearman
from nightpress.core.compress.evaluate.statistics import Array, Statistic, of_sums, paired_shares
from nightpress.core.compress.evaluate.view import OfExamples, OutputPair, ScorerRequest
from nightpress.core.compress.export.task import TokenSet
from nightpress.core.handoff.report import Measurement
from nightpress.core.recipes.labels import Label

_SHOWN = 20  #: labels, or outputs, that have figures of their own


@dataclass(frozen=True)
class ManyLabels(OfExamples):
    """Texts with the labels that hold [N, C] (0 or 1). A model says that a label holds if its sigmoid is above one half."""

    names: dict[int, str]

    def figures(self, view: OutputPair) -> list[Measurement]:
        held = self.examples.sequences.labels
        assert held is not None
        ours, theirs = ((side("values") > 0).astype(np.int64) == held for side in (view.ours, view.theirs))
        n = len(held)
        hits = [right.all(axis=1).astype(np.float64) for right in (ours, theirs)]
        found = [view.compared("accuracy", paired_shares(*hits, seed=view.seed), n=n, better="higher")]

        def counted(side: Any) -> Array:
            said = side("values") > 0
            counts = [said & (held > 0), said & (held == 0), ~said & (held > 0)]
            return np.concatenate(counts, axis=1).astype(np.float64)

        found.append(view.figure("f1", lambda side: of_sums(counted(side), macro_f1), n, n=n, better="higher"))
        support = held.sum(axis=0)
        for at in sorted(np.argsort(-support, kind="stable")[:_SHOWN].tolist()):

            def of_label(side: Any, at: int = at) -> Statistic:
                return of_sums(counted(side), lambda sums: class_f1(sums, at))

            of, count = self.names.get(at, str(at)), int(support[at])
            found.append(view.figure("class_f1", of_label, n, n=count, better="higher", of=of))
        return found + (fidelity.of_labels(view) if view.compares else [])


@dataclass(frozen=True)
class Numbers(OfExamples):
    """Texts with the numbers that the model should answer, [N, C]."""

    names: dict[int, str]

    def figures(self, view: OutputPair) -> list[Measurement]:
        truth = self.examples.sequences.labels
        assert truth is not None
        n, outputs = truth.shape

        def of_output(name: str, at: int) -> Any:
            correlation = pearson if name == "pearson" else spearman
            return lambda side: correlation(side("values")[:, at].astype(np.float64), truth[:, at])

        def of_all(name: str) -> Any:
            statistics = [of_output(name, at) for at in range(outputs)]

            def mean(side: Any) -> Statistic:
                made = [statistic(side) for statistic in statistics]
                return lambda times: np.mean([resampled(times) for resampled in made], axis=0)

            return mean

        found = []
        for name in ("spearman", "pearson"):
            found.append(view.figure(name, of_all(name), n, n=n, better="higher"))
            for at in range(min(outputs, _SHOWN)) if outputs > 1 else ():
                of = self.names.get(at, str(at))
                found.append(view.figure(name, of_output(name, at), n, n=n, better="higher", of=of))
        return found + (fidelity.of_numbers(view, self.names) if view.compares else [])


def many_labels(request: ScorerRequest) -> ManyLabels:
    """Read rows with `text`, or a pair of texts, and `label`: a class, a list of classes, or a list of 0 and 1 for all classes.

    Raises NightpressError(invalid_data).
    """
    rows, header = labelled(request), request.header
    several = [row.label if isinstance(row.label, tuple) else (row.label,) for row in rows]
    flags = all(len(of_row) == header.classes and set(of_row) <= {0, 1} for of_row in several)
    held = np.zeros((len(rows), header.classes), np.int64)
    for at, of_row in enumerate(several):
        if flags:
            held[at] = np.asarray(of_row, np.int64)
        else:
            held[at, [tokenized.class_index(label, header, request.ref) for label in of_row]] = 1
    return ManyLabels(_examples(request, rows, held), fidelity.output_names(header))


def numbers(request: ScorerRequest) -> Numbers:
    """Read rows with `text`, or a pair of texts, and `label`: a number, or a list with one for each output. Raises NightpressError(invalid_data)."""
    rows, outputs = labelled(request), request.header.classes
    truth = np.asarray([_numbers(request, row.label, outputs) for row in rows], np.float64)
    if (truth.min(axis=0) == truth.max(axis=0)).any():
        raise request.invalid("all its rows have the same number: nothing correlates with that", "Bring other rows.")
    return Numbers(_examples(request, rows, truth), fidelity.output_names(request.header))


def labelled(request: ScorerRequest) -> list[Row]:
    """The rows of a data set for a classifier: single texts or pairs."""
    return pair_rows(request.source) if has_pairs(request.source) else request.source.rows()


def are_numbers(rows: Sequence[Row], outputs: int) -> bool:
    """Whether every row has a number for each output of a model."""
    return all(_numbers_of(row.label, outputs) is not None for row in rows)


def _numbers_of(label: Label | None, outputs: int) -> list[float] | None:
    found = label if isinstance(label, tuple) else (label,)
    plain = [float(number) for number in found if isinstance(number, int | float)]
    return plain if len(plain) == len(found) == outputs else None


def _numbers(request: ScorerRequest, label: Label | None, outputs: int) -> list[float]:
    plain = _numbers_of(label, outputs)
    if plain is None:
        what = "one number" if outputs == 1 else f"a list of {outputs} numbers"
        raise request.invalid(f"the label {str(label)[:100]!r} is not {what}", f"Give every row {what} as its `label`.")
    return plain


def _examples(request: ScorerRequest, rows: list[Row], labels: NDArray[Any]) -> TokenSet:
    wanted, header = request.wanted, request.header
    sequences = tokenized.labelled_rows(
        rows, labels, request.tokenizer, header, samples=wanted.samples, length=wanted.length, seed=request.seed
    )
    return TokenSet(request.name, "logits", sequences, alone=header.one_text_a_batch)
