"""Metrics of how close an artifact's outputs are to the source's. They need no labels.

Every kind of output has `centred_cosine`: the mean of the source's outputs is subtracted from both sides, then the cosine is taken over
all outputs. A model that gives the same output for every text scores 0, even if that output is close to the mean. Each kind of output has
further metrics: agreement of the first choice and KL divergence, labels, numbers, or the direction of a vector.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from nightpress.core.compress.data import tokenized
from nightpress.core.compress.data.decoder_text import every_read_token, read_by_decoder
from nightpress.core.compress.data.pairs import has_pairs, pair_rows
from nightpress.core.compress.evaluate.scores import pearson, spearman
from nightpress.core.compress.evaluate.statistics import (
    Array,
    Statistic,
    of_sums,
    paired_shares,
    quantile,
    ratio,
    share_interval,
)
from nightpress.core.compress.evaluate.view import Better, OfExamples, OutputPair, ScorerRequest, spread, sums
from nightpress.core.compress.export.task import TokenSet
from nightpress.core.compress.model.cosines import cosine_of_products, row_cosines
from nightpress.core.compress.runners.measure import centred_products
from nightpress.core.handoff.report import Measurement
from nightpress.core.recipes.header import Head, ModelHeader

COMPARED_BYTES = 32 * 1024**2  #: limit of the source's saved distributions; KL divergence is taken at those positions
_MOST_TIMES = 4  #: data with slices may have that many times as much
#: figure → the share of the compared positions whose KL divergence does not exceed it
KL_QUANTILES = {"kl_median": 0.5, "kl_p90": 0.9, "kl_p99": 0.99, "kl_p999": 0.999, "kl_max": 1.0}
OUTPUTS_SHOWN = 20  #: a model with more outputs gets figures for those with the largest errors only


@dataclass(frozen=True)
class Fidelity(OfExamples):
    """Texts without labels. head, names: what a classifier's outputs mean; names: index of an output → its name."""

    head: Head = "classes"
    names: Mapping[int, str] = field(default_factory=dict)
    causal: bool = False  #: the examples are texts for a causal language model

    def figures(self, view: OutputPair) -> list[Measurement]:
        if not view.compares:
            return []
        match self.examples.kind:
            case "tokens":
                return of_next_tokens(view, self.examples) if self.causal else of_tokens(view, self.examples)
            case "logits":
                return of_head(view, self.head, self.names)
        return of_vectors(view)


def of_classifier(examples: TokenSet, header: ModelHeader) -> Fidelity:
    """For a model that outputs one row of numbers for each text."""
    return Fidelity(examples, header.head, output_names(header))


def output_names(header: ModelHeader) -> dict[int, str]:
    return {int(index): str(name) for index, name in (header.config.get("id2label") or {}).items()}


def prepare(request: ScorerRequest) -> Fidelity:
    """Make the examples: rows cut at `length` if any row has a label and the model is no decoder, else windows of running text."""
    header, wanted = request.header, request.wanted
    paired = header.task == "classification" and has_pairs(request.source)
    rows = pair_rows(request.source) if paired else request.source.rows()
    if paired or (any(row.label is not None for row in rows) and not header.is_decoder):
        rows = [rows[at] for at in request.drawn([row.slice for row in rows])]
        sequences = tokenized.text_rows(
            rows, request.tokenizer, header, samples=wanted.samples, length=wanted.length, seed=request.seed
        )
    else:
        sequences = tokenized.text_windows(
            rows, request.tokenizer, samples=wanted.samples, length=wanted.length, ref=request.ref, sliced=True
        )
    match header.task:
        case "embedding":
            return Fidelity(TokenSet(request.name, "pooled", sequences))
        case "classification":
            return of_classifier(TokenSet(request.name, "logits", sequences, alone=header.one_text_a_batch), header)
        case "masked-lm":
            sequences = tokenized.masked_targets(sequences, request.tokenizer, seed=request.seed)
        case "causal-lm":
            sequences = tokenized.next_token_targets(sequences)
        case "seq2seq":  # the decoder gets the encoder's text; outputs are compared at every token
            sequences = every_read_token(read_by_decoder(sequences, request.prefix))
        case _:
            return Fidelity(token_set(request.name, tokenized.every_token(sequences), header.classes))
    return Fidelity(token_set(request.name, sequences, request.vocabulary), causal=header.is_decoder)


def token_set(name: str, sequences: tokenized.Sequences, width: int) -> TokenSet:
    """Examples with scored tokens. width: numbers in the distribution of one position."""
    assert sequences.targets is not None
    scored = np.flatnonzero(sequences.targets.ravel() >= 0)
    limit = COMPARED_BYTES * min(len(set(sequences.slices or (None,))), _MOST_TIMES)  # else a slice would get very few
    return TokenSet(name, "tokens", sequences, compared=spread(scored, width, sequences.targets.shape, limit))


def _positions(examples: TokenSet) -> tuple[int, NDArray[np.int64], NDArray[np.int64]]:
    """The number of texts, the text of each scored token, and the text of each position whose whole distribution was kept."""
    targets = examples.sequences.targets
    assert targets is not None
    assert examples.compared is not None
    return len(targets), np.nonzero(targets >= 0)[0], np.nonzero(examples.compared)[0]


def _divergence(view: OutputPair) -> Array:
    """The KL divergence at each position whose whole distribution was kept. Rounding may make it slightly negative; then it is 0."""
    return np.maximum(view.ours("kl").astype(np.float64), 0)


def of_tokens(view: OutputPair, examples: TokenSet) -> list[Measurement]:
    """Agreement at every scored token. Divergence and centred cosine at the positions whose whole distributions were kept."""
    count, row, compared = _positions(examples)
    agreed, tokens = sums(row, view.ours("top1") == view.theirs("top1"), count), np.bincount(row, minlength=count)
    lost, places = sums(compared, _divergence(view), count), np.bincount(compared, minlength=count)
    some, kept = tokens > 0, places > 0
    agreement = view.resampled(
        "top1_agreement", ratio(agreed[some], tokens[some]), int(some.sum()), n=len(row), better="higher"
    )
    if not kept.any():  # of a slice, perhaps no distribution was kept
        return [agreement]
    return [
        agreement,
        view.resampled(
            "kl_divergence",
            ratio(lost[kept], places[kept]),
            int(kept.sum()),
            n=len(compared),
            better="lower",
            unit="nats",
        ),
        _centred(
            view,
            np.stack([sums(compared, product, count) for product in view.ours("products").T], axis=1)[kept],
            n=len(compared),
        ),
    ]


def of_next_tokens(view: OutputPair, examples: TokenSet) -> list[Measurement]:
    """`of_tokens` for a causal language model, with the figures that llama.cpp's `llama-perplexity --kl-divergence` prints, too.

    How the divergence is spread over the positions, and the root of the mean squared change of the right token's probability (RMS Δp).
    """
    count, row, compared = _positions(examples)
    divergence = _divergence(view)
    kept, of_kept = np.unique(compared, return_inverse=True)  # only rows with compared positions are resampled
    moved = sums(row, (np.exp(-view.ours("nll")) - np.exp(-view.theirs("nll"))) ** 2, count)
    tokens = np.bincount(row, minlength=count)
    some = tokens > 0
    rms = of_sums(
        np.stack([moved[some], tokens[some]], axis=1),
        lambda total: np.sqrt(total[:, 0] / np.maximum(total[:, 1], 1e-12)),
    )
    return [
        *of_tokens(view, examples),
        *(  # none if no distribution of a slice was kept
            view.resampled(
                name, quantile(divergence, of_kept, share), len(kept), n=len(compared), better="lower", unit="nats"
            )
            for name, share in KL_QUANTILES.items()
            if len(kept)
        ),
        view.resampled("rms_dp", rms, int(some.sum()), n=len(row), better="lower"),
    ]


def of_head(view: OutputPair, head: Head, names: Mapping[int, str]) -> list[Measurement]:
    """Metrics for a model that outputs one row of numbers for each text."""
    match head:
        case "numbers":
            return of_numbers(view, names)
        case "labels":
            return of_labels(view)
    return of_classes(view)


def of_classes(view: OutputPair) -> list[Measurement]:
    ours, theirs = (side("values").astype(np.float64) for side in (view.ours, view.theirs))
    agree = (ours.argmax(axis=1) == theirs.argmax(axis=1)).astype(np.float64)
    p, q = log_softmax(theirs), log_softmax(ours)
    kl = np.maximum((np.exp(p) * (p - q)).sum(axis=1), 0)
    same = paired_shares(agree, np.ones_like(agree), seed=view.seed).figure
    return [
        view.alone("top1_agreement", same, n=len(agree), better="higher"),
        of_flips(view, ours.argmax(axis=1), theirs.argmax(axis=1)),
        view.resampled("kl_divergence", ratio(kl), len(kl), n=len(kl), better="lower", unit="nats"),
        _centred(view, centred_products(ours, theirs)),
    ]


def of_answers(
    view: OutputPair, name: str, ours: NDArray[np.int64], theirs: NDArray[np.int64], right: NDArray[np.int64]
) -> list[Measurement]:
    """Metrics of answers of which one is right: the share of right ones under `name`, and flips. ours, theirs, right [N].

    Accuracy hides answers that change both ways. Dutta et al. 2024, Accuracy is Not All You Need (arXiv 2407.09141).
    """
    hits, n = [(answers == right).astype(np.float64) for answers in (ours, theirs)], len(right)
    found = [view.compared(name, paired_shares(*hits, seed=view.seed), n=n, better="higher")]
    if view.compares:
        broken = share_interval(hits[1] * (1 - hits[0]), seed=view.seed)
        found.append(view.alone("right_to_wrong", broken, n=n, better="lower"))
    return found


def of_flips(view: OutputPair, ours: NDArray[np.int64], theirs: NDArray[np.int64]) -> Measurement:
    """The share of answers that differ from the source's. ours, theirs [N]."""
    changed = share_interval((ours != theirs).astype(np.float64), seed=view.seed)
    return view.alone("flips", changed, n=len(ours), better="lower")


def of_labels(view: OutputPair) -> list[Measurement]:
    """Metrics for independent labels (multi-label): each output has its own sigmoid, and a label is true above 0.5."""
    ours, theirs = (side("values").astype(np.float64) for side in (view.ours, view.theirs))
    agree = ((ours > 0) == (theirs > 0)).mean(axis=1)
    same = paired_shares(agree, np.ones_like(agree), seed=view.seed).figure
    yes, no = (
        np.exp(log_sigmoid(sign * theirs)) * (log_sigmoid(sign * theirs) - log_sigmoid(sign * ours)) for sign in (1, -1)
    )
    kl = np.maximum((yes + no).sum(axis=1), 0)
    return [
        view.alone("label_agreement", same, n=len(agree), better="higher"),
        view.resampled("kl_divergence", ratio(kl), len(kl), n=len(kl), better="lower", unit="nats"),
        _centred(view, centred_products(ours, theirs)),
    ]


def of_numbers(view: OutputPair, names: Mapping[int, str]) -> list[Measurement]:
    """Metrics for regression outputs: correlation with the source's numbers, and errors. Several outputs: their mean, and each by itself.

    Errors are in standard deviations (σ) of the source's output on the same examples, so that a bound means the same for every model.
    """
    ours, theirs = (side("values").astype(np.float64) for side in (view.ours, view.theirs))
    n, outputs = ours.shape
    errors = np.abs(ours - theirs) / np.maximum(theirs.std(axis=0), 1e-9 * np.abs(theirs).max(axis=0) + 1e-30)
    kinds: list[tuple[str, Better, str, list[Statistic]]] = [
        ("rank_correlation", "higher", "", [spearman(a, b) for a, b in zip(ours.T, theirs.T, strict=True)]),
        ("correlation", "higher", "", [pearson(a, b) for a, b in zip(ours.T, theirs.T, strict=True)]),
        ("mean_error", "lower", "σ", [ratio(output) for output in errors.T]),
        ("largest_error", "lower", "σ", [_largest(output) for output in errors.T]),
    ]
    worst: list[int] = np.sort(np.argsort(-errors.mean(axis=0))[:OUTPUTS_SHOWN]).tolist() if outputs > 1 else []
    found = []
    for name, better, unit, statistics in kinds:
        found.append(view.resampled(name, _mean(statistics), n, n=n, better=better, unit=unit))
        for at in worst:
            of = names.get(at, str(at))
            found.append(view.resampled(name, statistics[at], n, n=n, better=better, unit=unit, of=of))
    return [*found, _centred(view, centred_products(ours, theirs))]


def of_vectors(view: OutputPair) -> list[Measurement]:
    """Metrics for an embedder. Vectors of different widths have no cosine: then the similarities of neighbouring texts are compared."""
    ours, theirs = view.ours("values"), view.theirs("values")
    if ours.shape[1] != theirs.shape[1]:
        pairs = [row_cosines(vectors, np.roll(vectors, 1, axis=0)) for vectors in (ours, theirs)]
        n = len(ours)
        return [view.resampled("rank_correlation", spearman(*pairs), n, n=n, better="higher")]
    cosines = row_cosines(ours, theirs)
    return [
        view.resampled("cosine", ratio(cosines), len(cosines), n=len(cosines), better="higher"),
        _centred(view, centred_products(ours, theirs)),
    ]


def _centred(view: OutputPair, products: Array, n: int | None = None) -> Measurement:
    """products [N, 3]: for each text, ours · theirs, |ours|² and |theirs|², centred. n: number of compared outputs; None: one per text."""
    count = len(products)
    return view.resampled("centred_cosine", of_sums(products, cosine_of_products), count, n=n or count, better="higher")


def _mean(statistics: Sequence[Statistic]) -> Statistic:
    return lambda times: np.mean([statistic(times) for statistic in statistics], axis=0)


def _largest(values: Array) -> Statistic:
    return lambda times: np.where(times > 0, values, 0.0).max(axis=1)


def log_sigmoid(logits: Array) -> Array:
    result: Array = -np.logaddexp(0, -logits)
    return result


def log_softmax(logits: Array) -> Array:
    """Logarithm of the softmax over the last axis: [N, C] → [N, C]."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
