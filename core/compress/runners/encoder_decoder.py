"""Runs the two graphs of an encoder-decoder in any runtime: over a given text, token by token, and writing on its own. Needs only numpy."""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Graphs(Protocol):
    """The two graphs, loaded by a runtime."""

    def encode(self, given: Array, mask: Array) -> Array:
        """The encoder's answer [B, S, H] float32. given: token ids [B, S], or features [B, bands, frames]; mask [B, S]."""
        ...

    def decode(self, tokens: Array, hidden: Array, mask: Array, cache: Any) -> tuple[Array, Any]:
        """The logits [B, T, V] of further tokens [B, T], and the cache after them. cache None: these are the first tokens."""
        ...

    @property
    def products(self) -> Sequence[Any]:
        """The products with packed weights of each graph. Each has `probed`, as `transformers_runner.OnCpu` has."""
        ...


def past_inputs(names: Iterable[str]) -> list[str]:
    """The inputs of a decoder's graph in ONNX Runtime that take keys and values."""
    return [name for name in names if name.startswith("past_key_values.")]


def past_feeds(shapes: Mapping[str, Any], rows: int, cache: Sequence[Array] | None) -> dict[str, Array]:
    """The keys and values for `past_inputs`. shapes: of the graph's inputs, by name.

    cache: what its last run returned after the logits, in the order of these inputs; None: there was no run, and they are empty.
    """
    past = past_inputs(shapes)
    if cache is not None:
        return dict(zip(past, cache, strict=False))
    return {name: np.zeros((rows, shapes[name][1], 0, shapes[name][3]), np.float32) for name in past}


def decoder_feeds(
    shapes: Mapping[str, Any], tokens: Array, hidden: Array, mask: Array, cache: Sequence[Array] | None
) -> dict[str, Array]:
    """The inputs of an encoder-decoder's decoder in ONNX Runtime. tokens, hidden, mask: as in `Graphs.decode`; the others as in `past_feeds`."""
    feeds = {"input_ids": tokens, "encoder_hidden_states": hidden}
    if "encoder_attention_mask" in shapes:
        feeds["encoder_attention_mask"] = mask
    return feeds | past_feeds(shapes, len(tokens), cache)


def decoder_text(ids: Array, prefix: list[int]) -> Array:
    """What the decoder reads where no text is given: its first tokens, then the encoder's text [B, S] → [B, S]; of sound, its first tokens."""
    first = np.tile(np.asarray(prefix, np.int64), (len(ids), 1))
    if ids.ndim != 2:
        return first
    whole: Array = np.concatenate([first, ids], axis=1)[:, : max(ids.shape[1], len(prefix))]
    return whole


def ends_of(folder: str) -> set[int]:
    """The tokens that end a text, as the folder says."""
    for name in ("generation_config.json", "config.json"):
        file = Path(folder, name)
        found = json.loads(file.read_bytes()).get("eos_token_id") if file.is_file() else None
        if found is not None:
            return set(found) if isinstance(found, list) else {int(found)}
    return set()


class Forward:
    """What `measure` asks of an encoder-decoder."""

    def __init__(self, graphs: Graphs, request: dict[str, Any]) -> None:
        self._graphs, self._prefix, self._ends = graphs, request["prefix"], ends_of(request["folder"])

    def probed(self, name: str, factor: float) -> Any:
        """As `transformers_runner.OnCpu.probed`, of the graph that has the layer."""
        answers = (products.probed(name, factor) for products in self._graphs.products)
        return next((answer for answer in answers if answer is not None), None)

    def __call__(self, ids: Array, mask: Array, _types: Any = None, decoder: Any = None) -> Array:
        """The logits [B, T, V] of all tokens of `decoder` at once; None: those of `decoder_text`."""
        tokens = decoder_text(ids, self._prefix) if decoder is None else decoder
        return self._graphs.decode(tokens, self._graphs.encode(ids, mask), mask, None)[0]

    def continued(self, ids: Array, mask: Array, decoder: Array) -> Array:
        """The same logits token by token: each step gets what was before it only through the cache."""
        hidden, cache, found = self._graphs.encode(ids, mask), None, []
        for at in range(decoder.shape[1]):
            logits, cache = self._graphs.decode(decoder[:, at : at + 1], hidden, mask, cache)
            found.append(logits)
        return np.concatenate(found, axis=1)

    def generate(self, ids: Array, new_tokens: int) -> list[int]:
        """What the model writes greedily for one text [S] or one sound [bands, frames]. It ends with the end token, if that comes."""
        _, written = self._write(ids[None], new_tokens, ends=self._ends)
        return [int(token) for token in written[0]]

    def waits(self, ids: Array, tokens: int, _cached: bool) -> tuple[list[float], Array]:
        """The milliseconds before each of `tokens` tokens, and the tokens [B, tokens]. The first wait has the encoder in it."""
        return self._write(ids, tokens, ends=set())

    def _write(self, ids: Array, tokens: int, ends: set[int]) -> tuple[list[float], Array]:
        mask = np.ones((len(ids), ids.shape[1] if ids.ndim == 2 else 1), np.int64)
        waits, written, last = [], [], time.perf_counter()
        hidden, cache = self._graphs.encode(ids, mask), None
        step = np.tile(np.asarray(self._prefix, np.int64), (len(ids), 1))
        for _ in range(tokens):
            logits, cache = self._graphs.decode(step, hidden, mask, cache)
            step = logits[:, -1:].argmax(axis=-1).astype(np.int64)
            written.append(step)
            now = time.perf_counter()
            waits.append(1000 * (now - last))
            last = now
            if len(ids) == 1 and int(step[0, 0]) in ends:
                break
        return waits, np.concatenate(written, axis=1)
