"""The tokens of a model whose vocabulary was cut, by the numbers of its source. Found by comparing both tokenizers."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nightpress.core.compress.data.tokenized import Sequences
from nightpress.core.compress.data.vocabulary import State, vocabulary_of
from nightpress.core.compress.runners.renumbered import expanded

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Renumbering:
    """How ids of the source are written with the tokens that were kept."""

    kept: Ids  #: [K], the source's id of each new id
    pieces: Ids  #: new ids of all the source's tokens, one after the other: one of a kept token, several finer ones of a cut token
    starts: Ids  #: [V + 1], where the pieces of each of the source's tokens begin

    def save(self, file: Path) -> Path:
        np.savez(file, kept=self.kept, pieces=self.pieces, starts=self.starts)
        return file

    def first(self, ids: Ids) -> Ids:
        """The first piece of each token: as many as before."""
        result: Ids = self.pieces[self.starts[ids]]
        return result

    def sequences(self, given: Sequences, *, aligned: bool) -> Sequences:
        """The same texts by new ids. aligned: a position stays a position, so a cut token is read as its first piece."""
        if aligned:
            read = None if given.decoder is None else self.first(given.decoder)
            return replace(given, ids=self.first(given.ids), decoder=read)
        types = np.zeros_like(given.ids) if given.types is None else given.types
        ids, mask, kinds = expanded(self.pieces, self.starts, given.ids, given.mask, types)
        return replace(given, ids=ids, mask=mask, types=None if given.types is None else kinds)


def renumbering(source: Path, pressed: Path) -> Renumbering:
    """Compare the tokenizers of two folders, the second of which has some of the tokens of the first."""
    from tokenizers import Tokenizer

    before, after = (json.loads((folder / "tokenizer.json").read_bytes()) for folder in (source, pressed))
    old, new = vocabulary_of(before), vocabulary_of(after)
    kept = np.array([old[token] for token, _ in sorted(new.items(), key=lambda item: item[1])], np.int64)
    model = Tokenizer.from_str(json.dumps(after)).model
    pieces: list[int] = []
    starts = [0]
    names = {at: token for token, at in old.items()}
    for at in range(max(names) + 1):
        token = names.get(at, "")
        pieces += [new[token]] if token in new else _pieces(model, after, token)
        starts.append(len(pieces))
    return Renumbering(kept, np.array(pieces, np.int64), np.array(starts, np.int64))


def _pieces(model: Any, state: State, token: str) -> list[int]:
    """The pieces of a cut token, at least one."""
    prefix = str(state["model"].get("continuing_subword_prefix") or "")
    if prefix and token.startswith(
        prefix
    ):  # the inside of a word: a letter before it is tokenized with it and left out
        found = [piece.id for piece in model.tokenize("a" + token.removeprefix(prefix))][1:]
    else:
        found = [piece.id for piece in model.tokenize(token)] if token else []
    return found or [0]
