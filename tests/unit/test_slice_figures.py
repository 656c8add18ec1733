"""The figures of a slice are those of its examples alone, for every kind of evaluation."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nightpress.core.compress.data.tokenized import Sequences
from nightpress.core.compress.evaluate.embeddings import Retrieval, Similarity
from nightpress.core.compress.evaluate.fidelity import Fidelity
from nightpress.core.compress.evaluate.labels import Classification, Entities
from nightpress.core.compress.evaluate.language import Choices, Generation, MaskedLm, Perplexity
from nightpress.core.compress.evaluate.neighbours import Neighbours
from nightpress.core.compress.evaluate.ranking import Ranking
from nightpress.core.compress.evaluate.slices import by_slice
from nightpress.core.compress.evaluate.view import OutputPair, Scorer
from nightpress.core.compress.export.consumer import Observed
from nightpress.core.compress.export.task import TokenSet
from nightpress.core.handoff.report import Measurement
from nightpress.core.recipes.sentence import EmbedderUse

N, WIDTH = 40, 6
NAMES = tuple("ab"[at % 2] for at in range(N))
IN_A = np.asarray([name == "a" for name in NAMES])
RANDOM = np.random.default_rng(0)


def _observed(**outputs: NDArray[Any]) -> Observed:
    return Observed({f"set.{key}": values for key, values in outputs.items()}, (), (), None, {}, "", 0.0, Path())


def _view(source: dict[str, NDArray[Any]], artifact: dict[str, NDArray[Any]]) -> OutputPair:
    return OutputPair("set", "data", _observed(**source), _observed(**artifact), seed=0)


def _sequences(**more: Any) -> Sequences:
    ids = np.ones((N, WIDTH), np.int64)
    return Sequences(ids, ids, **({"slices": NAMES} | more))


def _tokens() -> tuple[TokenSet, OutputPair]:
    """Texts with three scored tokens, of which two have their whole distributions."""
    targets = np.full((N, WIDTH), -1, np.int64)
    targets[:, :3] = RANDOM.integers(0, 9, (N, 3))
    compared = np.zeros((N, WIDTH), bool)
    compared[:, 1:3] = True
    sides = [
        {
            "nll": RANDOM.random(3 * N),
            "top1": RANDOM.integers(0, 9, 3 * N),
            "kl": RANDOM.random(2 * N),
            "products": RANDOM.random((2 * N, 3)),
        }
        for _ in range(2)
    ]
    return TokenSet("set", "tokens", _sequences(targets=targets), compared), _view(*sides)


def _vectors(kind: str, width: int = 4) -> tuple[TokenSet, OutputPair]:
    values = RANDOM.normal(size=(N, width))
    return TokenSet("set", kind, _sequences()), _view(
        {"values": values}, {"values": values + RANDOM.normal(size=values.shape)}
    )


def _alone(examples: TokenSet, kept: NDArray[np.bool_]) -> TokenSet:
    return examples.take(kept)


def _cases() -> dict[str, tuple[Any, OutputPair, Any, OutputPair]]:
    """Name → a scorer and its outputs, and the same with the examples of slice `a` alone."""
    found: dict[str, tuple[Any, OutputPair, Any, OutputPair]] = {}
    examples, view = _tokens()
    some = _view(
        *({key: value[np.repeat(IN_A, len(value) // N)] for key, value in side.items()} for side in _sides(view))
    )
    sizes = RANDOM.integers(3, 20, N).astype(np.float64)
    few = _alone(examples, IN_A)
    found["perplexity"] = Perplexity(examples, sizes), view, Perplexity(few, sizes[IN_A]), some
    found["masked"] = MaskedLm(examples), view, MaskedLm(few), some
    found["next tokens"] = Fidelity(examples, causal=True), view, Fidelity(few, causal=True), some
    names = {at: f"B-{'XYZ'[at % 3]}" if at else "O" for at in range(9)}
    truth = tuple(frozenset({("X", 0, 1)}) for _ in range(N))
    found["entities"] = Entities(examples, names, truth), view, Entities(few, names, truth[: N // 2]), some
    examples, view = _vectors("logits")
    labels = RANDOM.integers(0, 4, N)
    examples = replace(examples, sequences=replace(examples.sequences, labels=labels))
    some = _view(*({"values": side["values"][IN_A]} for side in _sides(view)))
    few = _alone(examples, IN_A)
    found["classes"] = Classification(examples, {}), view, Classification(few, {}), some
    found["numbers"] = Fidelity(examples, "numbers"), view, Fidelity(few, "numbers"), some
    examples, view = _vectors("pooled")
    some = _view(*({"values": side["values"][IN_A]} for side in _sides(view)))
    found["vectors"] = Fidelity(examples), view, Fidelity(_alone(examples, IN_A)), some
    pairs = np.arange(N).reshape(-1, 2)
    scores, of_pairs = RANDOM.random(N // 2), NAMES[: N // 2]
    kept = np.asarray([name == "a" for name in of_pairs])
    whole = Similarity(examples, pairs, scores, slices=of_pairs)
    used = np.repeat(kept, 2)
    theirs = _view(*({"values": side["values"][used]} for side in _sides(view)))
    alone = Similarity(_alone(examples, used), np.arange(kept.sum() * 2).reshape(-1, 2), scores[kept])
    found["similarity"] = whole, view, alone, theirs
    written = RANDOM.integers(0, 3, (N, WIDTH))
    chosen = np.where(RANDOM.random((N, WIDTH)) < 0.9, written, 7)
    examples = TokenSet("set", "generated", _sequences(), new_tokens=WIDTH)
    view = _view({"tokens": written}, {"tokens": chosen})
    found["generation"] = (
        Generation(examples),
        view,
        Generation(_alone(examples, IN_A)),
        _view({"tokens": written[IN_A]}, {"tokens": chosen[IN_A]}),
    )
    return found


def _sides(view: OutputPair) -> list[dict[str, NDArray[Any]]]:
    assert view.artifact is not None
    return [
        {key.removeprefix("set."): value for key, value in side.outputs.items()}
        for side in (view.source, view.artifact)
    ]


def _values(found: list[Measurement]) -> dict[tuple[str, str], tuple[float, int]]:
    return {(figure.name, figure.of): (pytest.approx(figure.value), figure.n) for figure in found}


@pytest.mark.parametrize("name", _cases())
def test_a_slices_figures_are_those_of_its_examples_alone(name: str):
    scorer, view, alone, some = _cases()[name]
    (part,) = [part for part in by_slice(scorer, view) if part.name == "a"]
    assert part.examples == sum(other == "a" for other in scorer.slices)
    assert {(figure.name, figure.of): (figure.value, figure.n) for figure in part.measurements} == _values(
        alone.figures(some)
    )
    for figure in part.measurements:
        assert figure.low is not None
        assert figure.low <= figure.value <= figure.high


def _first(scorer: Scorer, view: OutputPair, name: str = "a") -> dict[str, Measurement]:
    (part,) = [part for part in by_slice(scorer, view) if part.name == name]
    return {figure.name: figure for figure in part.measurements}


def test_a_slices_queries_look_among_all_passages():
    """A slice's query finds the passage of another slice first, which its own passages alone would not show."""
    values = np.eye(N)
    values[0] = values[N // 2 + 1] + 0.5 * values[N // 2]  # nearer to the second query's passage than to its own
    examples = TokenSet("set", "pooled", _sequences(slices=None))
    queries = np.arange(N // 2)
    scorer = Retrieval(examples, queries, queries + N // 2, np.eye(N // 2, dtype=bool), slices=NAMES[: N // 2])
    for at in range(1, N // 2):
        values[at] = values[at + N // 2]
    found = _first(scorer, _view({"values": values}, {"values": values}))
    assert found["ndcg"].value == pytest.approx((9 + 1 / np.log2(3)) / 10)
    assert found["ndcg"].n == 10
    assert found["cosine"].n == 20  # the slice's queries and their passages


def test_neighbours_of_a_slice_are_looked_for_among_all_texts():
    examples, view = _vectors("pooled")
    scorer = Neighbours(examples, ((None, "float32"),), EmbedderUse())
    whole = {figure.name: figure for figure in scorer.figures(view)}
    parts = [_first(scorer, view, name)["neighbour_recall"] for name in "ab"]
    assert np.mean([part.value for part in parts]) == pytest.approx(whole["neighbour_recall"].value)
    assert [part.n for part in parts] == [N // 2] * 2


def test_a_slices_rankings_are_its_queries():
    examples, view = _vectors("logits", 1)
    groups = tuple(np.arange(at, at + 2) for at in range(0, N, 2))
    gains = tuple(np.array([1.0, 0.0]) for _ in groups)
    scorer = Ranking(examples, groups, gains, slices=tuple("ab"[at % 2] for at in range(N // 2)))
    whole = {figure.name: figure for figure in scorer.figures(view)}
    parts = {name: _first(scorer, view, name) for name in "ab"}
    for name in ("ndcg", "kendall_tau", "top1_agreement"):
        assert np.mean([part[name].value for part in parts.values()]) == pytest.approx(whole[name].value)
    assert parts["a"]["mean_error"].n == N // 2


def test_flips_count_answers_that_change_and_right_ones_that_become_wrong():
    """Questions with two answers. In slice a the artifact changes three answers: one gets wrong, two get right."""
    count = 20
    targets = np.full((2 * count, 2), -1, np.int64)
    targets[:, 0] = 1
    examples = TokenSet(
        "set",
        "tokens",
        Sequences(np.ones((2 * count, 2), np.int64), np.ones((2 * count, 2), np.int64), targets=targets),
    )
    group = np.repeat(np.arange(count), 2)
    theirs = np.tile([0.0, 1.0], count)  # the source always chooses the first
    ours = theirs.copy()
    for question in (0, 2, 4):
        ours[2 * question : 2 * question + 2] = [1.0, 0.0]
    answers = np.arange(count) * 2 + np.isin(np.arange(count), [2, 4])
    scorer = Choices(examples, group, np.ones(2 * count), answers, slices=tuple("ab"[at % 2] for at in range(count)))
    view = _view({"nll": theirs}, {"nll": ours})
    a, b = _first(scorer, view), _first(scorer, view, "b")
    assert [a[name].value for name in ("choice_accuracy", "flips", "right_to_wrong")] == [0.9, 0.3, 0.1]
    assert [b[name].value for name in ("choice_accuracy", "flips", "right_to_wrong")] == [1.0, 0.0, 0.0]
    assert b["flips"].high > 0.05  # ten answers that are alike don't prove that all are


def test_few_examples_have_no_interval_and_one_has_no_figures():
    examples, view = _vectors("pooled")
    names = ("few",) * 9 + ("lone",) + ("many",) * 30
    scorer = Fidelity(replace(examples, sequences=replace(examples.sequences, slices=names)))
    parts = {part.name: part for part in by_slice(scorer, view)}
    assert [(name, part.examples) for name, part in parts.items()] == [("many", 30), ("few", 9), ("lone", 1)]
    assert all(figure.low is None for figure in parts["few"].measurements)
    assert parts["few"].measurements
    assert parts["lone"].measurements == ()


def test_texts_without_whole_distributions_have_the_other_figures():
    """Of large vocabularies few distributions are kept: a slice may have none."""
    examples, view = _tokens()
    compared = examples.compared & ~IN_A[:, None]
    outputs = [
        {key: value[np.repeat(~IN_A, 2)] if key in {"kl", "products"} else value for key, value in side.items()}
        for side in _sides(view)
    ]
    scorer = Fidelity(replace(examples, compared=compared), causal=True)
    assert set(_first(scorer, _view(*outputs))) == {"top1_agreement", "rms_dp"}
    assert "kl_p99" in _first(scorer, _view(*outputs), "b")


def test_data_without_slices_has_none():
    examples, view = _vectors("pooled")
    scorer = Fidelity(replace(examples, sequences=replace(examples.sequences, slices=None)))
    assert by_slice(scorer, view) == []
