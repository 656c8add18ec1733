"""Turns rows of text into token ids: windows of running text, or each row by itself, with or without labels."""

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nightpress.core.compress.data.halves import RUN, Part, half
from nightpress.core.compress.data.rows import Row, builtin_bytes, has_columns, read_records, read_rows
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.datafile import invalid
from nightpress.core.recipes.header import ModelHeader, padding_token
from nightpress.core.recipes.labels import Label

__all__ = ["Row", "read_records", "read_rows"]

Ids = NDArray[np.int64]

BUILTIN_LICENSE = "public domain"  #: see core/compress/data/LICENSE.md


class Tokenizer(Protocol):
    def encode(self, text: str, *, special: bool) -> list[int]: ...
    def encode_counted(self, text: str) -> tuple[list[int], list[int] | None]:
        """The tokens without special tokens, and the number of UTF-8 bytes that each token stands for. None if the bytes are unknown."""

    @property
    def mask_id(self) -> int | None: ...
    @property
    def pad_id(self) -> int: ...


@dataclass(frozen=True)
class Sequences:
    """Examples padded on the right. ids and mask are [N, S]. For images, ids are pixels [N, C, H, W] and the mask is [N, 1]."""

    ids: NDArray[Any]
    mask: Ids
    labels: Ids | None = None  #: [N], classification
    targets: Ids | None = None  #: [N, S], the token that each position should predict; -1: the position is not scored

    @property
    def tokens(self) -> int:
        return int(self.mask.sum())


def builtin_digest(purpose: str) -> str:
    """SHA-256 of a built-in text as it is shipped. purpose: `evaluation`, or `calibration` for the text that passes read."""
    return hashlib.sha256(builtin_bytes(purpose)).hexdigest()


@dataclass(frozen=True)
class DataSource:
    """A data set by its name in the recipe, with its file. A built-in data set has no file."""

    ref: str
    file: Path | None
    model_dir: Path | None = None  #: the model whose chat template renders conversations
    part: Part = "all"

    def rows(self) -> list[Row]:
        rows = read_rows(self.ref, self.file, model_dir=self.model_dir)
        return half(rows, self.part, ref=self.ref, run=1 if any(row.label is not None for row in rows) else RUN)

    def records(self) -> list[dict[str, Any]]:
        """The rows with all their columns. Raises NightpressError(invalid_data) for fewer than two rows, or for prose without columns."""
        if self.ref.startswith("builtin:"):
            raise invalid(self.ref, "it is prose, without the columns that this metric reads", "Bring a data set.")
        found = half(read_records(self.ref, self.file), self.part, ref=self.ref)
        if len(found) < 2:
            raise invalid(self.ref, "it has fewer than two rows: no interval can be given", "Bring more rows.")
        return found

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


def text_windows(rows: list[Row], tokenizer: Tokenizer, *, samples: int, length: int, ref: str) -> Sequences:
    """Cut running text into windows of equal length and take some, evenly spread: [samples, length] with the tokenizer's special tokens.

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
    stream: list[int] = []
    texts = iter(_spread(rows, samples * body))
    for row in texts:
        stream += tokenizer.encode(row.text + "\n", special=False)
    count = len(stream) // body
    if count < 2:
        raise invalid(
            ref,
            f"its {len(stream)} tokens fill fewer than two windows of {length}",
            "Bring more text, or ask for a shorter `length`.",
        )
    chosen = np.unique(np.linspace(0, count - 1, min(samples, count)).round().astype(np.int64))
    windows = np.asarray(stream[: count * body], np.int64).reshape(count, body)[chosen]
    ids = np.concatenate([np.tile(prefix, (len(chosen), 1)), windows, np.tile(suffix, (len(chosen), 1))], axis=1)
    ids = ids.astype(np.int64)
    return Sequences(ids=ids, mask=np.ones_like(ids))


def _spread(rows: list[Row], tokens: int) -> list[Row]:
    """The first rows that hold so many tokens. Assumes that a tokenizer gives at least one token for 8 characters of prose."""
    wanted, held = tokens * 8, 0
    for at, row in enumerate(rows):
        held += len(row.text)
        if held >= wanted:
            return rows[: at + 1]
    return rows


def labelled_rows(
    rows: list[Row], tokenizer: Tokenizer, header: ModelHeader, *, samples: int, length: int, seed: int, ref: str
) -> Sequences:
    """For classifiers: rows drawn without replacement, each with its class, cut at `length` tokens and padded."""
    labels = [class_index(row.label, header, ref) for row in rows]
    order = np.random.default_rng(seed).permutation(len(rows))[:samples]
    # Sorted by length, so that rows of a batch are of similar length and little is computed on padding.
    encoded = sorted(
        ((cut(tokenizer.encode(rows[at].text, special=True), length), labels[at]) for at in order),
        key=lambda pair: len(pair[0]),
    )
    sequences = pad([ids for ids, _ in encoded], tokenizer.pad_id)
    return Sequences(sequences.ids, sequences.mask, labels=np.asarray([label for _, label in encoded], np.int64))


def text_rows(rows: list[Row], tokenizer: Tokenizer, *, samples: int, length: int, seed: int) -> Sequences:
    """Rows drawn without replacement, cut at `length` tokens and padded."""
    order = np.sort(np.random.default_rng(seed).permutation(len(rows))[:samples])
    return pad([cut(tokenizer.encode(rows[at].text, special=True), length) for at in order], tokenizer.pad_id)


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
    return Sequences(sequences.ids, sequences.mask, targets=targets)


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
    return Sequences(ids, sequences.mask, targets=targets)


def every_token(sequences: Sequences) -> Sequences:
    """For token classifiers: mark every position that is not padding as scored (target 0)."""
    return Sequences(sequences.ids, sequences.mask, targets=np.where(sequences.mask > 0, 0, -1))


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


class FastTokenizer:
    """Reads tokenizer.json with the tokenizers library, which imports no code of the model."""

    def __init__(self, file: Path, pad_id: int | None = None) -> None:
        """pad_id: padding token from the model's config; None: the config names none, and the tokenizer's is used."""
        self._pad_id = pad_id
        from tokenizers import Tokenizer as Library

        with _tokenizer_faults():
            self._library: Any = Library.from_file(str(file))
        self._library.no_truncation()
        self._library.no_padding()

    def encode(self, text: str, *, special: bool) -> list[int]:
        return list(self._encoded(text, special).ids)

    def encode_counted(self, text: str) -> tuple[list[int], list[int] | None]:
        encoded = self._encoded(text, False)
        counts, at = [], 0
        for _, end in encoded.offsets:
            # Several tokens may stand for one character, and all of them end where it ends. The first gets its bytes, so the sum is right.
            counts.append(len(text[at:end].encode()) if end > at else 0)
            at = max(at, end)
        if counts:
            counts[-1] += len(text[at:].encode())
        return list(encoded.ids), counts

    def _encoded(self, text: str, special: bool) -> Any:
        with _tokenizer_faults():  # some faults appear only with a text, e.g. a missing token for unknown words
            return self._library.encode(text, add_special_tokens=special)

    @property
    def mask_id(self) -> int | None:
        return self._first("[MASK]", "<mask>")

    @property
    def pad_id(self) -> int:
        return self._first("[PAD]", "<pad>", "<|endoftext|>", "</s>") or 0 if self._pad_id is None else self._pad_id

    def _first(self, *names: str) -> int | None:
        return next((found for name in names if (found := self._library.token_to_id(name)) is not None), None)


@contextlib.contextmanager
def _tokenizer_faults() -> Iterator[None]:
    """Turn the library's errors into NightpressError(malformed_model): a bare Exception for a faulty file, else Rust's PanicException."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise NightpressError(
            ErrorCode.MALFORMED_MODEL,
            f"tokenizer.json can't be read: {str(error)[:300]}",
            hint="Save it again with the tokenizer's save_pretrained.",
            file="tokenizer.json",
        ) from error


class SlowTokenizer:
    """Reads any tokenizer that transformers supports, for models without a tokenizer.json."""

    def __init__(self, folder: Path, pad_id: int | None = None) -> None:
        """pad_id: padding token from the model's config; None: the config names none, and the tokenizer's is used."""
        self._pad_id = pad_id
        from transformers import AutoTokenizer

        try:
            self._library: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
            raise NightpressError(
                ErrorCode.MALFORMED_MODEL,
                f"The model's tokenizer can't be read: {str(error)[:300]}",
                hint="Add a tokenizer.json, saved with the tokenizer's save_pretrained.",
            ) from error

    def encode(self, text: str, *, special: bool) -> list[int]:
        return list(self._library.encode(text, add_special_tokens=special, verbose=False))

    def encode_counted(self, text: str) -> tuple[list[int], list[int] | None]:
        return self.encode(text, special=False), None

    @property
    def mask_id(self) -> int | None:
        return self._library.mask_token_id  # type: ignore[no-any-return]

    @property
    def pad_id(self) -> int:
        return self._library.pad_token_id or 0 if self._pad_id is None else self._pad_id


def open_tokenizer(folder: Path) -> Tokenizer:
    """Open the model's tokenizer. Raises NightpressError(malformed_model).

    The padding token is that of the model's config, if it names one: some models find the end of a text by it.
    """
    config = folder / "config.json"
    pad_id = padding_token(json.loads(config.read_bytes())) if config.is_file() else None
    file = folder / "tokenizer.json"
    return FastTokenizer(file, pad_id) if file.is_file() else SlowTokenizer(folder, pad_id)
