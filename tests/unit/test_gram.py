"""Running Gram matrices."""

import pytest
import torch

from nightpress.core.compress.solvers.gram import Gram, cholesky_of_stack, damped_cholesky


@pytest.mark.slow
def test_batches_add_up_to_one_symmetric_matrix_whatever_their_shape():
    inputs = torch.randn(3, 7, 2500)  # more columns than one strip of the computation
    gram = Gram(2500, "cpu")
    gram.add(inputs[:2].bfloat16())
    gram.add(inputs[2, :5].bfloat16())
    gram.add(inputs[2, 5:].bfloat16())
    flat = inputs.bfloat16().double().reshape(-1, 2500)
    matrix = gram.matrix()
    assert gram.tokens == 21
    assert torch.equal(matrix, matrix.T)
    torch.testing.assert_close(matrix.double(), flat.T @ flat, rtol=1e-5, atol=1e-4)


def test_a_layer_without_tokens_has_a_matrix_of_zeros():
    gram = Gram(8, "cpu")
    gram.add(torch.empty(0, 8))
    assert gram.tokens == 0
    assert not gram.matrix().any()


def _stack(count: int, size: int) -> torch.Tensor:
    inputs = torch.randn(count, 2 * size, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    return inputs.mT @ inputs


@pytest.mark.parametrize("size", [64, 128, 300])
def test_matrices_of_a_stack_are_factored_as_they_are_alone(size: int):
    grams = _stack(3, size)
    lower, faulty = cholesky_of_stack(grams)
    assert not faulty.any()
    torch.testing.assert_close(lower, torch.linalg.cholesky(grams), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("column", [0, 200])
def test_an_indefinite_matrix_of_a_stack_is_named(column: int):
    grams = _stack(3, 256)
    grams[1, column, column] = -1.0
    assert cholesky_of_stack(grams)[1].tolist() == [False, True, False]


def test_only_an_indefinite_matrix_is_damped_more():
    grams = torch.stack([torch.eye(4), torch.eye(4)]).double()
    grams[1, 3, 3] = -0.05
    lower, damping = damped_cholesky(grams.clone(), torch.tensor([0.01, 0.01]).double())
    assert damping.tolist() == pytest.approx([0.01, 0.1])
    for at in range(2):
        torch.testing.assert_close(lower[at] @ lower[at].T, grams[at] + damping[at] * torch.eye(4).double())
