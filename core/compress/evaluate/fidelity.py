"""How near an artifact's answers are to the source's: cosine, agreement of the first choice, Kullback-Leibler divergence. No labels."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from core.compress.evaluate import data
from core.compress.evaluate.consumer import TokenSet
from core.compress.evaluate.statistics import Array, paired_shares, ratio
from core.compress.evaluate.view import Asked, View, spread, sums
from core.handoff.report import Measurement

COMPARED_BYTES = 32 * 1024**2  #: saved distributions of the source; the divergence is taken over so many positions


@dataclass(frozen=True)
class Fidelity:
    """Texts of which no answer is known."""

    examples: TokenSet

    def figures(self, view: View) -> list[Measurement]:
        if not view.compares:
            return []
        match self.examples.kind:
            case "tokens":
                return of_tokens(view, self.examples)
            case "logits":
                return of_classes(view)
        return of_vectors(view)


def prepare(asked: Asked) -> Fidelity:
    """Windows of running text; of labelled rows the rows as they are."""
    header, wanted = asked.header, asked.wanted
    rows = asked.source.rows()
    if any(row.label is not None for row in rows) and not header.is_decoder:
        sequences = data.text_rows(rows, asked.tokenizer, samples=wanted.samples, length=wanted.length, seed=asked.seed)
    else:
        sequences = data.text_windows(
            rows, asked.tokenizer, samples=wanted.samples, length=wanted.length, ref=asked.ref
        )
    match header.task:
        case "embedding":
            return Fidelity(TokenSet(asked.name, "pooled", sequences))
        case "classification":
            return Fidelity(TokenSet(asked.name, "logits", sequences))
        case "masked-lm":
            sequences = data.masked_targets(sequences, asked.tokenizer, seed=asked.seed)
        case "causal-lm":
            sequences = data.next_token_targets(sequences)
        case "seq2seq":  # told to write what it read, and compared at every token
            sequences = data.every_token(sequences)
        case _:
            return Fidelity(token_set(asked.name, data.every_token(sequences), data.class_count(header)))
    return Fidelity(token_set(asked.name, sequences, asked.vocabulary))


def token_set(name: str, sequences: data.Sequences, width: int) -> TokenSet:
    """Examples with scored tokens; width: of one position's distribution."""
    assert sequences.targets is not None
    scored = np.flatnonzero(sequences.targets.ravel() >= 0)
    return TokenSet(name, "tokens", sequences, compared=spread(scored, width, sequences.targets.shape, COMPARED_BYTES))


def of_tokens(view: View, examples: TokenSet) -> list[Measurement]:
    """Agreement at every scored token, divergence at those whose distributions were kept."""
    targets = examples.sequences.targets
    assert targets is not None
    assert examples.compared is not None
    count = len(targets)
    row, compared = np.nonzero(targets >= 0)[0], np.nonzero(examples.compared)[0]
    agreed, tokens = sums(row, view.ours("top1") == view.theirs("top1"), count), np.bincount(row, minlength=count)
    divergence = np.maximum(view.ours("kl").astype(np.float64), 0)
    lost, places = sums(compared, divergence, count), np.bincount(compared, minlength=count)
    some, kept = tokens > 0, places > 0
    return [
        view.resampled(
            "top1_agreement", ratio(agreed[some], tokens[some]), int(some.sum()), n=len(row), better="higher"
        ),
        view.resampled(
            "kl_divergence",
            ratio(lost[kept], places[kept]),
            int(kept.sum()),
            n=len(compared),
            better="lower",
            unit="nats",
        ),
    ]


def of_classes(view: View) -> list[Measurement]:
    ours, theirs = (side("values").astype(np.float64) for side in (view.ours, view.theirs))
    agree = (ours.argmax(axis=1) == theirs.argmax(axis=1)).astype(np.float64)
    p, q = log_softmax(theirs), log_softmax(ours)
    kl = np.maximum((np.exp(p) * (p - q)).sum(axis=1), 0)
    same = paired_shares(agree, np.ones_like(agree), seed=view.seed).figure
    return [
        view.alone("top1_agreement", same, n=len(agree), better="higher"),
        view.resampled("kl_divergence", ratio(kl), len(kl), n=len(kl), better="lower", unit="nats"),
    ]


def of_vectors(view: View) -> list[Measurement]:
    cosines = row_cosines(view.ours("values"), view.theirs("values"))
    return [view.resampled("cosine", ratio(cosines), len(cosines), n=len(cosines), better="higher")]


def log_softmax(logits: Array) -> Array:
    """[N, C] → [N, C]"""
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def row_cosines(ours: NDArray[np.floating], theirs: NDArray[np.floating]) -> Array:
    """Cosine of each row with the other model's. [N, H] each → [N]"""
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    result: Array = (a * b).sum(axis=1) / np.maximum(norms, 1e-30)
    return result


def whole_cosine(ours: NDArray[np.floating], theirs: NDArray[np.floating]) -> float:
    """Cosine of two sets of outputs, each taken as one vector."""
    return float(row_cosines(ours.reshape(1, -1), theirs.reshape(1, -1))[0])
