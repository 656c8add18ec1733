"""Calibration text of several kinds for language models: prose, code, chats in the model's own template, and what the model itself writes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nightpress.core.compress.calibration.own_texts import own_windows, writes_texts
from nightpress.core.compress.context import PassContext
from nightpress.core.compress.data.chat import as_chats, chat_template
from nightpress.core.compress.data.rows import Row, read_rows
from nightpress.core.compress.data.tokenized import open_tokenizer, text_windows
from nightpress.core.recipes.calibration import CODE, MIXTURE, PROSE

Ids = NDArray[np.int64]


def mixed_windows(source: Path, context: PassContext) -> Ids:
    """Windows [samples, length] of all kinds by turns, in equal shares. `length` is at most the model's positions.

    A model without a chat template gets no chats, and a model that is too large to write in the memory of a job gets none of its own texts:
    the other kinds then have larger shares.
    """
    wanted = context.calibration
    length = min(wanted.length, context.header.positions or wanted.length)
    kinds: list[Callable[[int], Ids]] = [
        lambda count: _windows(_rows(PROSE, wanted.seed), source, count, length),
        lambda count: _windows(_rows(CODE, wanted.seed), source, count, length),
    ]
    if chat_template(source) is not None:
        kinds.append(lambda count: _windows(_chats(source, wanted.seed), source, count, length))
    if writes_texts(context.header):
        kinds.append(lambda count: own_windows(source, context, count, length))
    share, left = divmod(wanted.samples, len(kinds))
    parts = [kind(share + (at < left)) for at, kind in enumerate(kinds) if share + (at < left)]
    return _by_turns(parts)


def _windows(rows: list[Row], source: Path, count: int, length: int) -> Ids:
    # A data set must fill two windows; of a single one, the second is left out.
    return text_windows(rows, open_tokenizer(source), samples=max(2, count), length=length, ref=MIXTURE).ids[:count]


def _rows(ref: str, seed: int) -> list[Row]:
    return from_another(read_rows(ref, None, purpose="calibration"), seed)


def from_another(rows: list[Row], seed: int) -> list[Row]:
    """The rows from another one on, in their order: neighbouring texts stay neighbours. Seed 0: from the first."""
    start = int(np.random.default_rng(seed).integers(len(rows))) if seed else 0
    return rows[start:] + rows[:start]


def _chats(source: Path, seed: int) -> list[Row]:
    """Paragraphs of prose as the turns of chats."""
    return [Row(text) for text in as_chats([row.text for row in _rows(PROSE, seed)], source, ref=MIXTURE)]


def _by_turns(parts: list[Ids]) -> Ids:
    """The rows of all parts: the first of each, then the second of each, and so on."""
    most = max(len(part) for part in parts)
    return np.stack([part[at] for at in range(most) for part in parts if at < len(part)])
