"""What the decoder of an encoder-decoder reads while it is measured or calibrated: its first tokens, and a text."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nightpress.core.compress.data.tokenized import Sequences
from nightpress.core.compress.runners.encoder_decoder import decoder_text
from nightpress.core.recipes.header import ModelHeader

_LANGUAGE, _TASK = "<|en|>", "transcribe"  #: of a speech model that is told the language and what to do with it


def first_tokens(model_dir: Path, header: ModelHeader) -> tuple[int, ...]:
    """The tokens that a decoder starts with, as transformers' `generate` chooses them; empty for other models than encoder-decoders.

    A translator's forced first token, e.g. the target language, is one of them; a speech model's are English, `transcribe`, no timestamps.
    """
    if header.task != "seq2seq":
        return ()
    file = model_dir / "generation_config.json"
    config: dict[str, Any] = header.config | (json.loads(file.read_bytes()) if file.is_file() else {})
    named = (config.get(key) for key in ("decoder_start_token_id", "bos_token_id", "pad_token_id"))
    start = next((token for token in named if isinstance(token, int) and token >= 0), 0)
    forced = config.get("forced_bos_token_id")
    languages, tasks = (config.get(key) or {} for key in ("lang_to_id", "task_to_id"))
    told = (forced, languages.get(_LANGUAGE), tasks.get(_TASK), config.get("no_timestamps_token_id"))
    known = header.vocabulary or 0
    return (start, *(token for token in told if isinstance(token, int) and 0 <= token < known and token != start))


def read_by_decoder(sequences: Sequences, prefix: tuple[int, ...], *, tokens: int | None = None) -> Sequences:
    """The same examples, whose decoder reads the encoder's text after its first tokens. tokens: the most of it; None: as much as there is."""
    read = decoder_text(sequences.ids, list(prefix))[:, :tokens]
    return replace(sequences, decoder=read)


def every_read_token(sequences: Sequences) -> Sequences:
    """Mark every token that the decoder reads as scored (target 0), except where the encoder's text is padding."""
    assert sequences.decoder is not None
    targets = np.zeros_like(sequences.decoder)
    if sequences.mask.shape == targets.shape:
        targets = np.where(sequences.mask > 0, 0, -1)
    return replace(sequences, targets=targets)
