"""Reads a model's tokenizer: tokenizer.json with the tokenizers library, or any other kind with transformers."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.header import padding_token


class Tokenizer(Protocol):
    def encode(self, text: str, *, special: bool) -> list[int]: ...
    def encode_pair(self, first: str, second: str, length: int) -> tuple[list[int], list[int]]:
        """The tokens of two texts with special tokens, at most `length`: the longer text is cut first. And the type of each token."""

    def encode_counted(self, text: str) -> tuple[list[int], list[int] | None]:
        """The tokens without special tokens, and the number of UTF-8 bytes that each token stands for. None if the bytes are unknown."""

    @property
    def mask_id(self) -> int | None: ...
    @property
    def pad_id(self) -> int: ...


def open_tokenizer(folder: Path) -> Tokenizer:
    """Open the model's tokenizer. Raises NightpressError(malformed_model).

    The padding token is that of the model's config, if it names one: some models find the end of a text by it.
    """
    config = folder / "config.json"
    pad_id = padding_token(json.loads(config.read_bytes())) if config.is_file() else None
    file = folder / "tokenizer.json"
    return FastTokenizer(file, pad_id) if file.is_file() else SlowTokenizer(folder, pad_id)


def _longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of two texts are kept, so that both fit into `room`: the longer text is cut to the other's length first."""
    if first + second <= room:
        return first, second
    shorter = min(first, second, room // 2)
    return (shorter, room - shorter) if first <= second else (room - shorter, shorter)


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

    def encode_pair(self, first: str, second: str, length: int) -> tuple[list[int], list[int]]:
        sides = [self._encoded(text, False) for text in (first, second)]
        room = max(2, length - self._library.num_special_tokens_to_add(is_pair=True))
        first_kept, second_kept = _longest_first(len(sides[0]), len(sides[1]), room)
        sides[0].truncate(first_kept)
        sides[1].truncate(second_kept)
        whole = self._library.post_process(*sides, add_special_tokens=True)
        return list(whole.ids), list(whole.type_ids)

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

    def encode_pair(self, first: str, second: str, length: int) -> tuple[list[int], list[int]]:
        told = {"truncation": "longest_first", "max_length": length, "return_token_type_ids": True, "verbose": False}
        whole = self._library(first, second, **told)
        return list(whole["input_ids"]), list(whole["token_type_ids"])

    def encode_counted(self, text: str) -> tuple[list[int], list[int] | None]:
        return self.encode(text, special=False), None

    @property
    def mask_id(self) -> int | None:
        return self._library.mask_token_id  # type: ignore[no-any-return]

    @property
    def pad_id(self) -> int:
        return self._library.pad_token_id or 0 if self._pad_id is None else self._pad_id
