"""Cosines between two models' outputs."""

import numpy as np
from numpy.typing import NDArray

from nightpress.core.compress.runners.measure import centred_products

Array = NDArray[np.float64]


def row_cosines(ours: NDArray[np.floating], theirs: NDArray[np.floating]) -> Array:
    """The cosine of each row with the same row of the other model. [N, H] each → [N]."""
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    result: Array = (a * b).sum(axis=1) / np.maximum(norms, 1e-30)
    return result


def centred_cosine(ours: NDArray[np.floating], theirs: NDArray[np.floating]) -> float:
    """The cosine of two sets of outputs [N, …], each flattened to one vector. The mean row of theirs is subtracted from both first."""
    rows = (outputs.reshape(len(outputs), -1).astype(np.float64) for outputs in (ours, theirs))
    return float(cosine_of_products(centred_products(*rows).sum(axis=0, keepdims=True))[0])


def whole_cosine(ours: NDArray[np.floating], theirs: NDArray[np.floating]) -> float:
    """The cosine of two sets of outputs, each flattened to one vector."""
    return float(row_cosines(ours.reshape(1, -1), theirs.reshape(1, -1))[0])


def cosine_of_products(sums: Array) -> Array:
    """The cosines of N pairs of vectors from their products (a · b, a · a, b · b): [N, 3] → [N]."""
    product, ours, theirs = sums.T
    result: Array = product / np.sqrt(np.maximum(ours * theirs, 1e-300))
    return result
