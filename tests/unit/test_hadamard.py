"""Random Hadamard rotations."""

import pytest
import torch

from nightpress.core.compress.solvers.hadamard import Rotation, paley


@pytest.mark.parametrize("order", [4, 12, 20, 28, 36, 44, 60, 76])
def test_paleys_matrices_have_orthogonal_rows_of_ones(order: int):
    found = paley(order)
    assert torch.equal(found.abs(), torch.ones(order, order, dtype=torch.float64))
    assert torch.equal(found @ found.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("width", [1, 2, 64, 12, 96, 320, 576, 896, 1536])
def test_it_turns_vectors_and_spreads_each_input_over_all(width: int):
    turned = Rotation(width, seed=3)(torch.eye(width, dtype=torch.float64))
    torch.testing.assert_close(turned @ turned.T, torch.eye(width, dtype=torch.float64))
    torch.testing.assert_close(turned.abs(), torch.full((width, width), width**-0.5, dtype=torch.float64))


def test_a_width_without_a_known_hadamard_matrix_is_turned_too():
    width = 43 * 2
    turned = Rotation(width, seed=0)(torch.eye(width, dtype=torch.float64))
    torch.testing.assert_close(turned @ turned.T, torch.eye(width, dtype=torch.float64))
    assert turned.abs().max() < 0.8


@pytest.mark.slow
def test_the_seed_decides_and_all_leading_dimensions_are_turned_alike():
    x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(0))
    rotation = Rotation(24, seed=1)
    torch.testing.assert_close(rotation(x)[1, 2], rotation(x[1, 2]))
    assert torch.equal(rotation(x), Rotation(24, seed=1)(x))
    assert not torch.equal(rotation(x), Rotation(24, seed=2)(x))
    many = torch.randn(1024, 2048, generator=torch.Generator().manual_seed(0))  # turned in parts
    wide = Rotation(2048, seed=1)
    torch.testing.assert_close(wide(many)[1000:], wide(many[1000:]))
