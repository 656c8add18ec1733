"""The set `generated`: texts that the source writes, and what an artifact would have written at each of their positions. Needs only numpy."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def continuations(forward: Any, generate: Any, wanted: dict[str, Any], inputs: Any, reference: Any) -> dict[str, Array]:
    """The source generates tokens [N, new], −1 after its end. An artifact gives its own choice at each position of the source's text."""
    name = wanted["name"]
    ids, lengths = inputs[f"{name}.ids"], inputs[f"{name}.mask"].sum(axis=1)
    if reference is None:
        if generate is None:
            raise TypeError("the source's runner can't generate")
        tokens = np.full((len(ids), wanted["new_tokens"]), -1, np.int64)
        for at, length in enumerate(lengths):
            written = generate(ids[at, :length] if ids.ndim == 2 else ids[at], wanted["new_tokens"])
            tokens[at, : len(written)] = written
        return {f"{name}.tokens": tokens}
    written = reference[f"{name}.tokens"]
    if f"{name}.decoder" in inputs:
        return {f"{name}.tokens": _beside(forward, wanted, inputs, written)}
    chosen = np.full_like(written, -1)
    whole = np.zeros((len(ids), ids.shape[1] + written.shape[1]), np.int64)
    mask = np.zeros_like(whole)
    counts = (written >= 0).sum(axis=1)
    for at, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        whole[at, : length + count] = np.concatenate([ids[at, :length], written[at, :count]])
        mask[at, : length + count] = 1
    for start in range(0, len(ids), wanted["rows"]):
        rows = slice(start, start + wanted["rows"])
        width = int(mask[rows].sum(axis=1).max())
        given = whole[rows, :width], mask[rows, :width]
        choice = forward.chosen(*given) if hasattr(forward, "chosen") else forward(*given).argmax(axis=-1)  # [B, S]
        for at in range(start, min(start + wanted["rows"], len(ids))):
            first, count = lengths[at] - 1, counts[at]
            chosen[at, :count] = choice[at - start, first : first + count]
    return {f"{name}.tokens": chosen}


def _beside(forward: Any, wanted: dict[str, Any], inputs: Any, written: Array) -> Array:
    """A model's own choice at each position of the source's text `written` [N, new], −1 after its end → [N, new].

    wanted: the set of examples, as `measure` has it; its `decoder` [N, P] are the decoder's first tokens.
    """
    ids, mask, prefix = (inputs[f"{wanted['name']}.{key}"] for key in ("ids", "mask", "decoder"))
    found = np.full_like(written, -1)
    read = np.concatenate([prefix, np.maximum(written[:, :-1], 0)], axis=1)
    choose = getattr(forward, "chosen", None) or (lambda *given, **more: forward(*given, **more).argmax(axis=-1))
    for start in range(0, len(ids), wanted["rows"]):
        rows = slice(start, start + wanted["rows"])
        width = int(mask[rows].sum(axis=1).max())
        given = ids[rows, :width] if ids.ndim == 2 else ids[rows]
        choice = choose(given, mask[rows, :width], decoder=read[rows])[:, prefix.shape[1] - 1 :]
        found[rows] = np.where(written[rows] >= 0, choice, -1)
    return found
