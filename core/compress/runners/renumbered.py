"""Runs a model with fewer tokens than its source on the source's token ids, and gives its logits by the source's ids.

`request["renumber"]` is the .npz of a `model/renumbering.py`. In logits [B, S, V] the cut tokens have `CUT`. Where a text has one answer,
a cut token is replaced by its finer pieces. Where every position has one, positions must stay: a cut token is read as its first piece.
"""

from typing import Any

import numpy as np

CUT = -1e30  #: logit of a token that the model does not have
_OVER_TOKENS = frozenset({"causal-lm", "masked-lm", "seq2seq"})


class Renumbered:
    """A runner's `forward` by the source's token ids."""

    def __init__(self, forward: Any, file: str, request: dict[str, Any], pool: Any) -> None:
        self._forward, self._pool = forward, pool
        with np.load(file) as archive:
            self.kept, self._pieces, self._starts = (archive[name] for name in ("kept", "pieces", "starts"))
        self._task, self._pooling, self._width = request["task"], request["pooling"], len(self._starts) - 1
        for name in ("loaded_as", "peak_memory", "peak_gpu", "probed"):
            if hasattr(forward, name):
                setattr(self, name, getattr(forward, name))
        if hasattr(forward, "continued"):
            self.continued = lambda ids, mask, **read: self._whole(
                forward.continued(self.first(ids), mask, **self._read(read))
            )

    def first(self, ids: Any) -> Any:
        return self._pieces[self._starts[ids]]

    def old(self, tokens: Any) -> Any:
        """New ids by the source's numbers."""
        return self.kept[np.asarray(tokens)]

    def _read(self, read: Any) -> Any:
        """What an encoder-decoder's decoder reads, if it is told."""
        return {name: self.first(tokens) for name, tokens in read.items()}

    def __call__(self, ids: Any, mask: Any, types: Any = None, **read: Any) -> Any:
        if self._task in _OVER_TOKENS:
            return self._whole(self._forward(self.first(ids), mask, **self._read(read)))
        if self._task == "token-classification":
            return self._forward(self.first(ids), mask)
        new, real, kinds = expanded(
            self._pieces, self._starts, ids, mask, np.zeros_like(ids) if types is None else types
        )
        out = self._forward(new, real, *(() if types is None else (kinds,)))
        return self._pool(out, real, self._pooling) if out.ndim == 3 else out

    def timed(self, ids: Any, mask: Any) -> None:
        getattr(self._forward, "timed", self._forward)(self.first(ids), mask)

    def _whole(self, logits: Any) -> Any:
        """Logits [..., K] → [..., V] by the source's ids."""
        found = np.full((*logits.shape[:-1], self._width), CUT, np.float32)
        found[..., self.kept] = logits[..., : len(self.kept)]
        return found


def expanded(pieces: Any, starts: Any, ids: Any, mask: Any, types: Any) -> tuple[Any, Any, Any]:
    """Texts [B, S] with every token replaced by its pieces, padded on the right: ids, mask and types [B, S′].

    pieces: of all tokens, one after the other; starts [V + 1]: where those of each token begin.
    """
    rows = []
    for row, real, kinds in zip(ids, mask.sum(axis=1), types, strict=True):
        found = [pieces[starts[token] : starts[token + 1]] for token in row[:real]]
        rows.append((np.concatenate(found), np.repeat(kinds[:real], [len(part) for part in found])))
    padding = pieces[starts[ids[0, -1]]]  # masked, so any token will do
    new = np.full((len(rows), max(len(row) for row, _ in rows)), padding, np.int64)
    new_mask, new_types = np.zeros_like(new), np.zeros_like(new)
    for at, (row, kinds) in enumerate(rows):
        new[at, : len(row)], new_mask[at, : len(row)], new_types[at, : len(row)] = row, 1, kinds
    return new, new_mask, new_types


def renumbered_waits(waits: Any, forward: Renumbered) -> Any:
    """`waits` by the source's token ids."""

    def run(ids: Any, tokens: int, cached: bool) -> tuple[list[float], Any]:
        taken, text = waits(forward.first(ids), tokens, cached)
        return taken, forward.old(text)

    return run


def renumbered_prefix(request: dict[str, Any]) -> list[int]:
    """The first tokens of an encoder-decoder's decoder by the model's own ids."""
    with np.load(request["renumber"]) as archive:
        return [int(archive["pieces"][archive["starts"][token]]) for token in request["prefix"]]
