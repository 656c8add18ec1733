"""Several runners that share out the examples of a model give the outputs of one, to the last bit."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nightpress.core.compress.runners import measure

_TEXTS, _LENGTH, _WORDS = 10, 6, 50
_SETS = [
    {"name": "scored", "kind": "tokens", "rows": 3},
    {"name": "small", "kind": "pooled", "rows": 3},
]


def _inputs() -> dict[str, NDArray[Any]]:
    random = np.random.default_rng(0)
    ids = random.integers(0, _WORDS, (_TEXTS, _LENGTH))
    mask = np.ones_like(ids)
    mask[3, 4:] = 0
    return {
        "scored.ids": ids,
        "scored.mask": mask,
        "scored.targets": np.where(mask > 0, ids, -1),
        "scored.compared": (random.random(ids.shape) < 0.3) & (mask > 0),
        "small.ids": ids[:1],
        "small.mask": mask[:1],
    }


def _outputs(shift: float, reference: dict[str, NDArray[Any]] | None, parts: int) -> dict[str, NDArray[Any]]:
    logits = np.random.default_rng(1).normal(size=(_WORDS, _WORDS)).astype(np.float32) + np.float32(shift)
    logits[0] *= 1 + np.float32(shift)

    def forward(ids: NDArray[Any], mask: NDArray[Any]) -> NDArray[Any]:
        found: NDArray[Any] = logits[ids] * mask[..., None]
        return found

    found: dict[str, list[NDArray[Any]]] = {}
    for part in range(parts):
        request = {"sets": _SETS, "pooling": "mean", "part": [part, parts]}
        for name, array in measure.run_sets(forward, None, request, _inputs(), reference).items():
            found.setdefault(name, []).append(array)
    return {name: np.concatenate(arrays) for name, arrays in found.items()}


@pytest.mark.parametrize("parts", [2, 3, 4, 7])
def test_parts_of_the_examples_give_the_outputs_of_all(parts: int):
    source = _outputs(0.0, None, 1)
    for shift, reference in ((0.0, None), (0.1, source)):
        whole, joined = (_outputs(shift, reference, count) for count in (1, parts))
        assert whole.keys() == joined.keys()
        assert all(np.array_equal(whole[name], joined[name]) for name in whole)
    assert {"scored.kl", "scored.products", "small.values"} <= whole.keys()


@pytest.mark.parametrize(("count", "rows", "parts"), [(10, 3, 2), (10, 3, 4), (1, 16, 3), (32, 16, 2), (7, 1, 7)])
def test_parts_are_whole_batches_and_all_of_them(count: int, rows: int, parts: int):
    found = [measure.own_examples(count, rows, (at, parts)) for at in range(parts)]
    assert [example for part in found for example in range(count)[part]] == list(range(count))
    assert all(part.start % rows == 0 or part.start == count for part in found)
