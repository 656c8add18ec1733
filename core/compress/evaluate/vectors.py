"""An embedder's vectors as sentence-transformers returns and compares them: normalized, truncated, and by the folder's similarity function."""

import numpy as np
from numpy.typing import NDArray

from nightpress.core.compress.evaluate.statistics import Array
from nightpress.core.recipes.sentence import EmbedderUse, SimilarityFunction

_CHUNK = 256  #: rows of which distances to all others are held at a time


def used_vectors(pooled: NDArray[np.floating], use: EmbedderUse, truncate_dim: int | None) -> Array:
    """Pooled outputs [N, H] → the vectors that a user gets, [N, D] float64: normalized if the folder says so, then truncated."""
    vectors = unit(pooled) if use.normalized else pooled.astype(np.float64)
    return vectors if truncate_dim is None else vectors[:, :truncate_dim]


def unit(vectors: NDArray[np.floating]) -> Array:
    """Each row [N, D] with the length 1."""
    wide = vectors.astype(np.float64)
    result: Array = wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-30)
    return result


def similarities(a: Array, b: Array, function: SimilarityFunction) -> Array:
    """The similarity of every row of a [N, D] with every row of b [M, D]: [N, M], larger is nearer."""
    if function == "cosine":
        a, b = unit(a), unit(b)
    if function in {"cosine", "dot"}:
        result: Array = a @ b.T
        return result
    order = 2 if function == "euclidean" else 1
    parts = [a[start : start + _CHUNK] for start in range(0, len(a), _CHUNK)]
    return np.concatenate([-np.linalg.norm(part[:, None] - b[None], ord=order, axis=2) for part in parts])


def pair_similarities(a: Array, b: Array, function: SimilarityFunction) -> Array:
    """The similarity of each row of a [N, D] with the same row of b: [N]."""
    if function == "cosine":
        a, b = unit(a), unit(b)
    if function in {"cosine", "dot"}:
        result: Array = (a * b).sum(axis=1)
        return result
    far: Array = np.linalg.norm(a - b, ord=2 if function == "euclidean" else 1, axis=1)
    return -far
