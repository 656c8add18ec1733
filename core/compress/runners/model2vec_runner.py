"""Loads a table of token vectors with model2vec. Needs no torch."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import measure  # type: ignore[import-not-found]
import numpy as np

SNIPPET = """\
from model2vec import StaticModel

model = StaticModel.from_pretrained({folder!r})
"""


class Forward:
    """The mean of the tokens' vectors, as the library's `encode` computes it from a text. Special tokens have the vector 0."""

    def __init__(self, model: Any) -> None:
        self._table, self._normalize = model.embedding, model.normalize
        self.loaded_as = {"device": "cpu", "dtype": model.embedding_dtype}

    def __call__(self, ids: Any, mask: Any, _types: Any = None) -> Any:
        sums = np.stack(
            [
                self._table[row[: int(real)]].astype(np.float32).sum(axis=0)
                for row, real in zip(ids, mask.sum(axis=1), strict=True)
            ]
        )
        if self._normalize:
            return sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-30)
        return sums / np.maximum(mask.sum(axis=1, keepdims=True), 1)


def load(request: dict[str, Any]) -> tuple[Forward, dict[str, str], str]:
    snippet = SNIPPET.format(folder=request["folder"])
    model = measure.execute(snippet)["model"]
    import model2vec

    return Forward(model), {"model2vec": model2vec.__version__}, snippet


if __name__ == "__main__":
    measure.main(load)
