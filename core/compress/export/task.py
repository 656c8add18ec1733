"""What a consumer is asked to run: examples whose outputs are kept, and what is timed. All models of a job get the same."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nightpress.core.compress.data.tokenized import Sequences
from nightpress.core.recipes.costs import LOGIT_BYTES


@dataclass(frozen=True)
class TokenSet:
    """Examples for a runner, and the outputs that it keeps."""

    name: str
    kind: str  #: the outputs that are kept: `pooled`, `logits`, `last`, `steps`, `tokens`, `generated` or `written`
    sequences: Sequences
    compared: NDArray[np.bool_] | None = None  #: [N, S], the positions where whole distributions are compared
    new_tokens: int = 0  #: for `generated` and `written`: the most tokens that are generated
    alone: bool = False  #: each batch has one text, because the model can't read padded texts

    def take(self, kept: NDArray[np.bool_]) -> "TokenSet":
        """Some of the examples. kept [N]."""
        compared = None if self.compared is None else self.compared[kept]
        return replace(self, sequences=self.sequences.take(kept), compared=compared)

    def rows(self, classes: int) -> int:
        """The number of rows in a batch. classes: the width of one position's output."""
        if self.alone:
            return 1
        read = self.sequences.ids if self.sequences.decoder is None else self.sequences.decoder
        length = int(read.shape[1]) + self.new_tokens
        per_row = 4 * length * classes if self.kind in {"tokens", "last", "steps", "generated"} else 4 * length * 8192
        return max(1, min(16, LOGIT_BYTES // max(per_row, 1)))


@dataclass(frozen=True)
class TimedShape:
    batch: int
    length: int
    repeats: int


@dataclass(frozen=True)
class TimedGeneration:
    """Greedy decoding to be timed."""

    batch: int
    prompt: int
    tokens: int
    repeats: int
    cached: bool = True  #: with a cache, as the folder's settings say; else each token takes a pass over the whole text


@dataclass(frozen=True)
class TimedServing:
    """Requests that are served at a time, to be timed in vLLM."""

    requests: int
    prompt: int
    tokens: int  #: written for each request
    repeats: int


@dataclass(frozen=True)
class Task:
    """The examples and timings that run with every model of a job, so that all models get the same inputs."""

    name: str  #: header.task
    model_class: str  #: the class of transformers that loads the model
    sets: tuple[TokenSet, ...]
    shapes: tuple[TimedShape, ...]
    timing_ids: NDArray[Any]  #: consecutive token ids, or one image [C, H, W]
    pooling: str
    classes: int  #: size of the vocabulary, or number of classes
    threads: int
    writings: tuple[TimedGeneration, ...] = ()
    servings: tuple[TimedServing, ...] = ()  #: only in vLLM
    cache_bytes: int = 0  #: of the key/value cache, only in vLLM
    prefix: tuple[int, ...] = ()  #: the first tokens of an encoder-decoder's decoder

    @property
    def only_timed(self) -> "Task":
        """The same task without its examples."""
        return replace(self, sets=())

    @property
    def only_examples(self) -> "Task":
        """The same task without what is timed."""
        return replace(self, shapes=(), writings=())

    def request(self) -> dict[str, Any]:
        """The part of a runner's request that describes the task; see core/compress/runners/measure.py."""
        sets = [
            {
                "name": data_set.name,
                "kind": data_set.kind,
                "rows": data_set.rows(self.classes),
                "new_tokens": data_set.new_tokens,
            }
            for data_set in self.sets
        ]
        told = {
            "task": self.name,
            "model_class": self.model_class,
            "pooling": self.pooling,
            "threads": self.threads,
            "longest": self.longest,
            "prefix": list(self.prefix),
        }
        return told | {"cache_bytes": self.cache_bytes, "sets": sets}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The runner's input arrays, by name."""
        arrays: dict[str, NDArray[Any]] = {"timing.ids": self.timing_ids}
        for data_set in self.sets:
            arrays[f"{data_set.name}.ids"] = data_set.sequences.ids
            arrays[f"{data_set.name}.mask"] = data_set.sequences.mask
            for part, known in (("types", data_set.sequences.types), ("decoder", data_set.sequences.decoder)):
                if known is not None:
                    arrays[f"{data_set.name}.{part}"] = known
            if data_set.kind == "tokens":
                assert data_set.sequences.targets is not None
                assert data_set.compared is not None
                arrays[f"{data_set.name}.targets"] = data_set.sequences.targets
                arrays[f"{data_set.name}.compared"] = data_set.compared
        return arrays

    @property
    def longest(self) -> int:
        """The number of tokens of the longest text."""
        widths = [
            int(data_set.sequences.ids.shape[1]) + data_set.new_tokens * (data_set.kind == "written")
            for data_set in self.sets
        ]
        requests: tuple[TimedGeneration | TimedServing, ...] = (*self.writings, *self.servings)
        written = [request.prompt + request.tokens for request in requests]
        return max([*widths, *(shape.length for shape in self.shapes), *written])


def add_arrays(digest: "hashlib._Hash", arrays: Mapping[str, NDArray[Any]]) -> None:
    """Add arrays, by name, to a digest: their names, types, shapes and values."""
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
