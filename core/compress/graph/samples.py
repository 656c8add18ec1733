"""What runs through a model's graphs to calibrate and judge them: texts, images or sounds, and the text of a decoder."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nightpress.core.compress.graph.modules import DECODER, ENCODER, MODEL
from nightpress.core.compress.runners.encoder_decoder import decoder_feeds

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]
Feeds = dict[str, Any]
#: The inputs of a graph's next run, and which of its tokens are real: [B, S] each, of the decoder and of what it reads the encoder's answer to.
Batch = tuple[Feeds, tuple[NDArray[np.bool_], ...]]


@dataclass(frozen=True)
class Samples:
    given: Mapping[str, NDArray[Any]]  #: inputs of the first graph by name, [N, …] each
    mask: Ids  #: [N, S]; [N, 1] for images and sounds
    length: int  #: tokens, patches or frames that the first graph computes for a sample
    decoder: Ids | None = None  #: [N, T], what an encoder-decoder's decoder reads
    decoder_mask: Ids | None = None  #: [N, T]

    @property
    def tokens(self) -> int:
        """The number of real tokens that the model reads; of images and sounds, all patches or frames."""
        read = int(self.mask.sum()) if self.mask.shape[1] > 1 else len(self) * self.length
        return read + (0 if self.decoder_mask is None else int(self.decoder_mask.sum()))

    def __len__(self) -> int:
        return len(self.mask)

    def __getitem__(self, rows: slice) -> "Samples":
        return replace(
            self,
            given={name: values[rows] for name, values in self.given.items()},
            mask=self.mask[rows],
            decoder=None if self.decoder is None else self.decoder[rows],
            decoder_mask=None if self.decoder_mask is None else self.decoder_mask[rows],
        )

    def cut(self, length: int) -> "Samples":
        """The same samples with at most so many tokens each. Images and sounds stay whole."""
        if self.mask.shape[1] == 1:
            return self
        given = {name: values[:, :length] for name, values in self.given.items()}
        return replace(self, given=given, mask=self.mask[:, :length], length=min(length, self.length))

    def batches(self, tokens: int) -> "Iterator[Samples]":
        """Yield about `tokens` tokens at a time, at least one sample."""
        rows = max(1, tokens // self.length)
        for at in range(0, len(self), rows):
            yield self[at : at + rows]

    def batch(self, loaded: Any) -> Batch:
        """The inputs of a first graph's session for all these samples, and its real tokens."""
        names = {value.name for value in loaded.get_inputs()}
        return {name: values for name, values in self.given.items() if name in names}, (self.mask > 0,)

    def decoder_batch(self, loaded: Any, hidden: Floats) -> Batch:
        """The inputs of a decoder's session, with empty caches. hidden [N, S, H]: the encoder's answers."""
        assert self.decoder is not None
        assert self.decoder_mask is not None
        feeds = decoder_feeds(_shapes(loaded), self.decoder, hidden, self.mask, None)
        return feeds, (self.decoder_mask > 0, self.mask > 0)


#: (the session of a graph, tokens at a time) → its runs.
Feeder = Callable[[Any, int], Iterator[Batch]]


def feeders(samples: Samples, encoder: Any | None) -> Mapping[str, Feeder]:
    """How samples run through each graph of a model. encoder: the session of an encoder-decoder's encoder, whose answers its decoder reads."""

    def first(loaded: Any, tokens: int) -> Iterator[Batch]:
        return (part.batch(loaded) for part in samples.batches(tokens))

    def second(loaded: Any, tokens: int) -> Iterator[Batch]:
        for part in samples.batches(tokens):
            yield part.decoder_batch(loaded, encoder.run(None, part.batch(encoder)[0])[0])  # type: ignore[union-attr]

    return {MODEL: first} if encoder is None else {ENCODER: first, DECODER: second}


def answer(sessions: Mapping[str, Any], sample: Samples) -> tuple[Floats, Ids]:
    """The model's first output for samples, and which of its tokens are real, [B, S] or [B, T]."""
    if MODEL in sessions:
        return sessions[MODEL].run(None, sample.batch(sessions[MODEL])[0])[0], sample.mask
    assert sample.decoder_mask is not None
    encoder, decoder = sessions[ENCODER], sessions[DECODER]
    hidden = encoder.run(None, sample.batch(encoder)[0])[0]
    return decoder.run(None, sample.decoder_batch(decoder, hidden)[0])[0], sample.decoder_mask


def written(
    sessions: Mapping[str, Any], samples: Samples, prefix: tuple[int, ...], ends: set[int], tokens: int, at_a_time: int
) -> Samples:
    """The same samples with what the model itself writes for them, greedily, as what its decoder reads: its first tokens, then `tokens`."""
    texts, masks = [], []
    encoder, decoder = sessions[ENCODER], sessions[DECODER]
    shapes = _shapes(decoder)
    for part in samples.batches(at_a_time):
        hidden, cache = encoder.run(None, part.batch(encoder)[0])[0], None
        step = np.tile(np.asarray(prefix, np.int64), (len(part), 1))
        text, alive = [step], np.ones((len(part), 1), np.int64)
        mask = [np.ones_like(step)]
        for _ in range(tokens):
            logits, *cache = decoder.run(None, decoder_feeds(shapes, step, hidden, part.mask, cache))
            step = logits[:, -1:].argmax(axis=-1).astype(np.int64)
            text.append(step)
            mask.append(alive)
            alive = alive * ~np.isin(step, list(ends))
            if not alive.any():
                break
        own, real = np.concatenate(text, axis=1), np.concatenate(mask, axis=1)
        texts.append(own)
        masks.append(real)
    width = max(text.shape[1] for text in texts)
    whole, real = (
        np.concatenate([np.pad(rows, ((0, 0), (0, width - rows.shape[1]))) for rows in parts])
        for parts in (texts, masks)
    )
    return replace(samples, decoder=whole, decoder_mask=real)


def _shapes(loaded: Any) -> dict[str, Any]:
    return {value.name: value.shape for value in loaded.get_inputs()}


def session(graph: bytes | Path, threads: int) -> Any:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.log_severity_level = 3
    source = graph if isinstance(graph, bytes) else str(graph)
    return onnxruntime.InferenceSession(source, settings, providers=["CPUExecutionProvider"])
