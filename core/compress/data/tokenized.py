"""Turns rows of text into token ids: windows of running text, or each row by itself, with or without labels."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nightpress.core.compress.data.halves import RUN, Part, half
from nightpress.core.compress.data.rows import Row, builtin_bytes, has_columns, read_records, read_rows
from nightpress.core.compress.data.slices import Slices, by_slice, draw, evenly, shares, slices_of
from nightpress.core.compress.data.tokenizer import Tokenizer, open_tokenizer
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.labels import Label, slice_of
from nightpress.core.recipes.textfile import invalid

__all__ = ["Row", "Tokenizer", "open_tokenizer", "read_records", "read_rows"]

Ids = NDArray[np.int64]

BUILTIN_LICENSE = "public domain"  #: see core/compress/data/LICENSE.md


@dataclass(frozen=True)
class Sequences:
    """Examples padded on the right. ids and mask are [N, S].

    For images, ids are pixels [N, C, H, W]; for sound, log-mel features [N, bands, frames]. Their mask is [N, 1].
    """

    ids: NDArray[Any]
    mask: Ids
    labels: NDArray[Any] | None = None  #: [N], the class; [N, C], labels that hold (0 or 1), or numbers
    types: Ids | None = None  #: [N, S], 1 at the second text of a pair; None: the model reads no types, or single texts
    #: [N, S], or [N, T] over the decoder's tokens: the token that each position should predict; -1: the position is not scored
    targets: Ids | None = None
    decoder: Ids | None = None  #: [N, T], what the decoder of an encoder-decoder reads
    slices: Slices | None = None  #: of each example; None: the data has no slices

    @property
    def tokens(self) -> int:
        return int(self.mask.sum())

    def take(self, kept: NDArray[np.bool_]) -> "Sequences":
        """Some of the examples. kept [N]."""

        def of(array: NDArray[Any] | None) -> NDArray[Any] | None:
            return None if array is None else array[kept]

        return Sequences(self.ids[kept], self.mask[kept], of(self.labels), of(self.types), of(self.targets))


def builtin_digest(ref: str, purpose: str) -> str:
    """SHA-256 of a built-in text as it is shipped. purpose: `evaluation`, or `calibration` for the text that passes read."""
    return hashlib.sha256(builtin_bytes(ref, purpose)).hexdigest()


@dataclass(frozen=True)
class DataSource:
    """A data set by its name in the recipe, with its file. A built-in data set has no file."""

    ref: str
    file: Path | None
    model_dir: Path | None = None  #: the model whose chat template renders conversations
    part: Part = "all"
    purpose: Literal["evaluation", "calibration"] = "evaluation"  #: which part of the built-in prose

    def rows(self) -> list[Row]:
        rows = read_rows(self.ref, self.file, purpose=self.purpose, model_dir=self.model_dir)
        return half(rows, self.part, ref=self.ref, run=1 if any(row.label is not None for row in rows) else RUN)

    def records(self) -> list[dict[str, Any]]:
        """The rows with all their columns. Raises NightpressError(invalid_data) for fewer than two rows, or for prose without columns."""
        if self.ref.startswith("builtin:"):
            raise invalid(self.ref, "it is prose, without the columns that this metric reads", "Bring a data set.")
        found = half(read_records(self.ref, self.file), self.part, ref=self.ref)
        if len(found) < 2:
            raise invalid(self.ref, "it has fewer than two rows: no interval can be given", "Bring more rows.")
        return found

    def slices(self, records: Sequence[Mapping[str, Any]]) -> list[str | None]:
        """The slice of each row."""
        return [slice_of(record.get("slice")) for record in records]

    def has(self, *names: str) -> bool:
        """Whether the data set has rows with one of these columns."""
        return not self.ref.startswith("builtin:") and has_columns(self.ref, self.file, names)

    def field(self, record: dict[str, Any], at: int, kind: str, *names: str) -> Any:
        """The value of the first column in `names` that the row has.

        at: the row's index, for error texts. kind: `text`, `number`, `words` (list of texts), `texts` (text or list of texts) or `list`.
        Raises NightpressError(invalid_data) if the value is missing or of another kind.
        """
        found = next((record[name] for name in names if record.get(name) is not None), None)
        if kind == "texts" and isinstance(found, str):
            found = [found]
        if not _is_a(kind, found):
            called = " or ".join(f"`{name}`" for name in names)
            what = f"has no {called}" if found is None else f"has a {called} that is not {_KINDS[kind]}"
            raise invalid(self.ref, f"row {at + 1} {what}", f"Give every row {called}: {_KINDS[kind]}.")
        return found


_KINDS = {
    "text": "a text that says something",
    "number": "a number",
    "words": "a list of words",
    "texts": "a text or a list of texts",
    "list": "a list",
}


def _is_a(kind: str, found: object) -> bool:
    match kind:
        case "text":
            return isinstance(found, str) and bool(found.strip())
        case "number":
            return isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found)
        case "words":
            return isinstance(found, list) and bool(found) and all(isinstance(text, str) for text in found)
        case "texts":
            return isinstance(found, list) and bool(found) and all(_is_a("text", text) for text in found)
    return isinstance(found, list) and bool(found)


def text_windows(
    rows: list[Row], tokenizer: Tokenizer, *, samples: int, length: int, ref: str, sliced: bool = False
) -> Sequences:
    """Cut running text into windows of equal length and take some, evenly spread: [samples, length] with the tokenizer's special tokens.

    sliced: no window mixes the rows of two slices, and every slice gets an equal share of the windows, as far as its text goes.
    Fewer windows are returned if the text is short. Raises NightpressError(invalid_data) for fewer than two windows, and
    NightpressError(invalid_recipe) if `length` holds no text.
    """
    prefix, suffix = special_tokens(tokenizer)
    body = length - len(prefix) - len(suffix)
    if body < 2:
        raise NightpressError(
            ErrorCode.INVALID_RECIPE,
            f"A length of {length} leaves no room for text beside the model's special tokens.",
            hint="Use at least 16 tokens.",
        )
    streams = {
        name: [
            token for row in _spread(some, samples * body) for token in tokenizer.encode(row.text + "\n", special=False)
        ]
        for name, some in (by_slice(rows) if sliced else {None: rows}).items()
    }
    counts = [len(stream) // body for stream in streams.values()]
    if sum(counts) < 2:
        raise invalid(
            ref,
            f"its {sum(map(len, streams.values()))} tokens fill fewer than two windows of {length}",
            "Bring more text, or ask for a shorter `length`.",
        )
    cut_up = [
        np.asarray(stream[: count * body], np.int64).reshape(count, body)[evenly(count, share)]
        for stream, count, share in zip(streams.values(), counts, shares(counts, samples), strict=True)
    ]
    windows = np.concatenate(cut_up)
    ids = np.concatenate([np.tile(prefix, (len(windows), 1)), windows, np.tile(suffix, (len(windows), 1))], axis=1)
    ids = ids.astype(np.int64)
    names = tuple(name for name, some in zip(streams, cut_up, strict=True) for _ in some)
    return Sequences(ids=ids, mask=np.ones_like(ids), slices=slices_of(names))


def _spread(rows: list[Row], tokens: int) -> list[Row]:
    """The first rows that hold so many tokens. Assumes that a tokenizer gives at least one token for 8 characters of prose."""
    wanted, held = tokens * 8, 0
    for at, row in enumerate(rows):
        held += len(row.text)
        if held >= wanted:
            return rows[: at + 1]
    return rows


def labelled_rows(
    rows: list[Row],
    labels: NDArray[Any],
    tokenizer: Tokenizer,
    header: ModelHeader,
    *,
    samples: int,
    length: int,
    seed: int,
) -> Sequences:
    """For classifiers: rows drawn without replacement, each with its label, cut at `length` tokens and padded. labels [N] or [N, C]."""
    order = draw([row.slice for row in rows], samples, seed)
    # Sorted by length, so that rows of a batch are of similar length and little is computed on padding.
    encoded = sorted(((encode_row(rows[at], tokenizer, length), at) for at in order), key=lambda pair: len(pair[0][0]))
    sequences = pad_typed([row for row, _ in encoded], tokenizer.pad_id, header)
    taken = [at for _, at in encoded]
    return replace(sequences, labels=labels[taken], slices=slices_of(rows[at].slice for at in taken))


def text_rows(
    rows: list[Row], tokenizer: Tokenizer, header: ModelHeader, *, samples: int, length: int, seed: int
) -> Sequences:
    """Rows drawn without replacement, cut at `length` tokens and padded."""
    order = np.sort(np.random.default_rng(seed).permutation(len(rows))[:samples])
    sequences = pad_typed([encode_row(rows[at], tokenizer, length) for at in order], tokenizer.pad_id, header)
    return replace(sequences, slices=slices_of(rows[at].slice for at in order))


def encode_row(row: Row, tokenizer: Tokenizer, length: int) -> tuple[list[int], list[int]]:
    """A row's tokens, at most `length`, with special tokens, and the type of each."""
    if row.second is not None:
        return tokenizer.encode_pair(row.text, row.second, length)
    ids = cut(tokenizer.encode(row.text, special=True), length)
    return ids, [0] * len(ids)


def class_index(label: Label | None, header: ModelHeader, ref: str) -> int:
    """The model's index of a row's class. Raises NightpressError(invalid_data) for a class that the model does not have."""
    classes = header.classes
    if isinstance(label, str):
        names = {str(name): int(index) for name, index in (header.config.get("label2id") or {}).items()}
        if label in names:
            label = names[label]
    if label is None:
        raise invalid(ref, "some rows have no `label`", "Give every row one, or measure `fidelity`.")
    if not isinstance(label, int) or not 0 <= label < classes:
        raise invalid(
            ref,
            f"the label {str(label)[:100]!r} is none of the model's {classes} classes",
            f"Use 0 to {classes - 1}, or a name from the model's label2id.",
        )
    return label


def pad(sequences: list[list[int]], pad_id: int) -> Sequences:
    width = max(len(sequence) for sequence in sequences)
    ids = np.full((len(sequences), width), pad_id, np.int64)
    mask = np.zeros_like(ids)
    for at, sequence in enumerate(sequences):
        ids[at, : len(sequence)] = sequence
        mask[at, : len(sequence)] = 1
    return Sequences(ids, mask)


def pad_typed(rows: list[tuple[list[int], list[int]]], pad_id: int, header: ModelHeader) -> Sequences:
    """As `pad`, for the results of `encode_row`. The types are left out if the model reads none, or if all are 0."""
    padded = pad([ids for ids, _ in rows], pad_id)
    types = np.zeros_like(padded.ids)
    for at, (_, of_row) in enumerate(rows):
        types[at, : len(of_row)] = of_row
    return replace(padded, types=types) if header.reads_types and types.any() else padded


def cut(ids: list[int], length: int) -> list[int]:
    """Cut to `length` tokens, but keep the last token: it may be a separator."""
    return ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]


def special_tokens(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    whole, plain = tokenizer.encode("the", special=True), tokenizer.encode("the", special=False)
    for at in range(len(whole) - len(plain) + 1):
        if whole[at : at + len(plain)] == plain:
            return whole[:at], whole[at + len(plain) :]
    return [], []


def next_token_targets(sequences: Sequences) -> Sequences:
    """For causal language models: the target of each position is the next token."""
    targets = np.full_like(sequences.ids, -1)
    targets[:, :-1] = np.where(sequences.mask[:, 1:] > 0, sequences.ids[:, 1:], -1)
    return replace(sequences, targets=targets)


def masked_targets(sequences: Sequences, tokenizer: Tokenizer, *, share: float = 0.15, seed: int) -> Sequences:
    """For masked language models: hide a share of the tokens behind the mask token. Each hidden token is the target of its position."""
    before, after = special_tokens(tokenizer)
    hidden = np.random.default_rng(seed).random(sequences.ids.shape) < share
    hidden &= (sequences.mask > 0) & ~np.isin(sequences.ids, [*before, *after])
    if not hidden.any():
        hidden[:, sequences.ids.shape[1] // 2] = True
    targets = np.where(hidden, sequences.ids, -1)
    mask_id = tokenizer.mask_id
    ids = sequences.ids if mask_id is None else np.where(hidden, mask_id, sequences.ids)
    return replace(sequences, ids=ids, targets=targets)


def every_token(sequences: Sequences) -> Sequences:
    """For token classifiers: mark every position that is not padding as scored (target 0)."""
    return replace(sequences, targets=np.where(sequences.mask > 0, 0, -1))


def check_vocabulary(sequences: Sequences, header: ModelHeader) -> None:
    """Raises NightpressError(malformed_model) if the tokenizer gives a token for which the model has no embedding."""
    size = header.vocabulary
    highest = int(sequences.ids.max())
    if isinstance(size, int) and highest >= size:
        raise NightpressError(
            ErrorCode.MALFORMED_MODEL,
            f"The tokenizer gives the token {highest}, but the model has embeddings for {size} tokens only.",
            hint="The tokenizer belongs to another model: put the right tokenizer.json into the folder.",
            file="tokenizer.json",
        )
