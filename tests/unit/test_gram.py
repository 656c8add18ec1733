"""Running Gram matrices."""

import torch

from nightpress.core.compress.solvers.gram import Gram


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
