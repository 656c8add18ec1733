"""The losses of distillation and the choice of an exit's threshold, compared with their papers."""

import numpy as np
import pytest
import torch

from nightpress.core.compress.model.exits import exit_scores
from nightpress.core.compress.solvers.distillation import (
    cosine_distance,
    hidden_error,
    label_error,
    number_error,
    pool,
    relation_divergence,
    soft_cross_entropy,
)
from nightpress.core.compress.solvers.exits import choose, exit_outcome, outcomes

_RANDOM = torch.Generator().manual_seed(0)


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=_RANDOM)


def test_soft_targets_are_kl_times_t_squared_and_zero_for_the_teacher_itself():
    student, teacher, t = _normal(5, 7), _normal(5, 7), 3.0
    p, q = (teacher / t).softmax(-1), (student / t).softmax(-1)
    assert float(soft_cross_entropy(student, teacher, t)) == pytest.approx(
        float(t**2 * (p * (p / q).log()).sum(-1).mean()), rel=1e-5
    )
    assert float(soft_cross_entropy(teacher, teacher, t)) == pytest.approx(0, abs=1e-6)


def test_the_gradient_keeps_its_size_when_the_temperature_rises():
    teacher = _normal(64, 5)
    norms = []
    for t in (4.0, 40.0):
        student = torch.zeros(64, 5, requires_grad=True)
        soft_cross_entropy(student, teacher, t).backward()
        norms.append(float(student.grad.norm()))
    assert norms[1] == pytest.approx(norms[0], rel=0.1)


def test_all_kept_logits_are_the_whole_loss_and_fewer_compare_only_those():
    student, teacher = _normal(4, 6), _normal(4, 6)
    top = teacher.topk(6)
    whole = soft_cross_entropy(student, teacher, 2.0)
    assert float(soft_cross_entropy(student.gather(-1, top.indices), top.values, 2.0)) == pytest.approx(
        float(whole), rel=1e-5
    )
    few = teacher.topk(2)
    moved = student.clone().scatter_add_(1, teacher.topk(6).indices[:, 4:], torch.ones(4, 2))
    assert torch.equal(
        soft_cross_entropy(student.gather(-1, few.indices), few.values, 2.0),
        soft_cross_entropy(moved.gather(-1, few.indices), few.values, 2.0),
    )


def test_padding_counts_nowhere():
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    ours, theirs = _normal(2, 4, 8), _normal(2, 4, 8)
    noise = _normal(2, 4, 8) * (1 - mask)[:, :, None]
    assert torch.allclose(hidden_error(ours, theirs, mask), hidden_error(ours + noise, theirs - noise, mask))
    assert torch.allclose(
        relation_divergence(ours, theirs, mask, 2), relation_divergence(ours + noise, theirs - noise, mask, 2)
    )
    assert torch.allclose(pool(ours, mask, "mean"), pool(ours + noise, mask, "mean"))
    assert torch.allclose(pool(ours, mask, "mean")[1], ours[1, :2].mean(0))


def test_relations_compare_vectors_of_different_widths():
    mask = torch.ones(2, 5, dtype=torch.int64)
    narrow = _normal(2, 5, 8)
    # Heads of twice the width: with the factor 2^-¼, their products over the root of the width are the same.
    turned = torch.cat([narrow, narrow], -1) / 2**0.25
    halves = torch.cat([turned.view(2, 5, 2, 2, 4)[:, :, at].transpose(2, 3).reshape(2, 5, 8) for at in range(2)], -1)
    assert halves.shape == (2, 5, 16)
    assert float(relation_divergence(narrow, narrow, mask, 2)) == pytest.approx(0, abs=1e-6)
    assert float(relation_divergence(_normal(2, 5, 4), narrow, mask, 2)) > 0


def test_cosine_is_blind_to_length():
    vectors = _normal(3, 8)
    assert float(cosine_distance(3 * vectors, vectors)) == pytest.approx(0, abs=1e-6)
    assert float(cosine_distance(-vectors, vectors)) == pytest.approx(2, rel=1e-5)


def test_scores_grow_with_certainty_and_count_what_they_say():
    sure, torn = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.1, 0.0]])
    mask = torch.ones(1, 10, dtype=torch.int64)
    for policy in ("confidence", "entropy"):
        high, low = exit_scores([sure, torn], mask, policy)
        assert 1 >= float(high) > float(low) >= 0
    heads = [
        torch.tensor([[1.0, 0.0], [1.0, 0.0]]),
        torch.tensor([[2.0, 0.0], [0.0, 1.0]]),
        torch.tensor([[3.0, 0.0], [0.0, 2.0]]),
    ]
    mask = torch.tensor([[1] * 10, [1] * 5 + [0] * 5])
    assert torch.stack(exit_scores(heads, mask, "patience")).tolist() == [[0, 0], [1, 0], [2, 1]]
    assert torch.allclose(
        torch.stack(exit_scores(heads, mask, "length")), torch.tensor([[0.1, 0.2], [0.2, 0.4], [0.3, 0.6]])
    )


def test_a_threshold_costs_what_it_costs():
    scores = np.asarray([[0.9, 0.2, 0.6], [0.1, 0.8, 0.7]])
    right = np.asarray([[True, False, False], [True, True, True], [True, True, True]])
    depths = np.asarray([2, 4, 6])
    found = exit_outcome(scores, right, depths, 0.65)
    assert found.depth == pytest.approx((2 + 4 + 4) / 3)
    assert found.accuracy == 1.0
    assert found.share == pytest.approx((1 / 3, 2 / 3, 0))
    early = exit_outcome(scores, right, depths, 0.0)
    assert (early.depth, early.accuracy) == (2.0, pytest.approx(1 / 3))


def test_the_chosen_threshold_is_the_cheapest_within_the_budget():
    random = np.random.default_rng(0)
    scores = random.random((3, 400))
    right = random.random((4, 400)) < np.asarray([0.6, 0.7, 0.8, 0.9])[:, None]
    found = outcomes(scores, right, np.asarray([1, 2, 3, 4]))
    assert found[-1].depth == 4
    picked = choose(found, 0.05)
    assert picked.accuracy >= found[-1].accuracy - 0.05
    assert picked.depth == min(item.depth for item in found if item.accuracy >= found[-1].accuracy - 0.05)
    assert choose(found, 1.0).depth == 1
    assert choose(found, 0.0).accuracy >= found[-1].accuracy


def test_numbers_are_compared_in_the_teachers_own_spread() -> None:
    """A distribution over one number is always the same: its divergence would teach a reranker nothing."""
    teacher = torch.tensor([[1.0], [3.0], [5.0]])
    assert float(number_error(teacher, teacher)) == 0
    assert float(number_error(teacher + 2, teacher)) == pytest.approx(4 / (8 / 3))
    assert float(number_error(10 * teacher + 20, 10 * teacher)) == pytest.approx(4 / (8 / 3))
    assert float(soft_cross_entropy(teacher + 2, teacher, 1.0)) == 0


def test_texts_without_a_label_teach_no_label():
    logits, labels = _normal(4, 3), torch.tensor([2, -100, 0, -100])
    labelled = torch.nn.functional.cross_entropy(logits[[0, 2]], labels[[0, 2]])
    assert float(label_error(logits, labels)) == pytest.approx(float(labelled))
    assert float(label_error(logits, torch.full((4,), -100))) == 0
