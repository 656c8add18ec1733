"""Read a data set through once and say whether it can be used: UTF-8 text, or rows with `text` or `messages` and perhaps `label`.

Rows are JSON or CSV. Parquet is looked at from outside alone: what it holds shows on a worker, which has the library to read it.
"""

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from core.errors import ErrorCode, NightpressError

_PIECE = 256 * 1024
_MAX_LINE = 1024**2
_MAX_LABEL = 99_999
#: the first column of rows for metrics that read more than a text; see docs/evaluation.md
_OTHER_COLUMNS = frozenset({"text_a", "sentence1", "text1", "query", "anchor", "question", "prompt", "tokens", "words"})


@dataclass(frozen=True)
class DataFacts:
    rows: int | None  #: of text: lines that are not blank; None: unknown
    labels: int | None  #: classes, counted as the highest label plus one; 0: unlabelled; None: unknown


def check_data_name(path: str) -> None:
    """Raises NightpressError(unsupported_format) for what is no data set by its name."""
    plain = path.removesuffix(".gz").endswith((".txt", ".jsonl", ".csv"))
    if "/" in path or not (plain or path.endswith(".parquet")):
        raise NightpressError(
            ErrorCode.UNSUPPORTED_FORMAT,
            f"{path[:200]} is not a kind of file that a data set is here.",
            hint="Bring one .txt, .jsonl or .csv file, plain or as .gz, or one .parquet file.",
            file=path,
        )


def examine_data(path: str, pieces: Iterable[bytes], limit: int) -> DataFacts:
    """Read all of a data set, unpacked to at most `limit` bytes. Raises NightpressError(invalid_data) with the line at fault."""
    if path.endswith(".parquet"):
        return _look_at_parquet(path, pieces)
    plain = _unpacked(path, pieces, limit) if path.endswith(".gz") else pieces
    if path.removesuffix(".gz").endswith(".csv"):
        return _count_table(path, _lines(path, plain))
    if path.removesuffix(".gz").endswith(".jsonl"):
        facts = _count_rows(path, _lines(path, plain))
    else:
        facts = DataFacts(sum(1 for _, line in _lines(path, plain) if line.strip()), 0)
    if facts.rows == 0:
        raise _invalid(path, "it is empty", "A data set needs at least one line of text.")
    return facts


def _look_at_parquet(path: str, pieces: Iterable[bytes]) -> DataFacts:
    first, last = b"", b""
    for piece in pieces:
        first = first or piece[:4]
        last = (last + piece)[-4:]
    if first != b"PAR1" or last != b"PAR1":
        raise _invalid(path, "it is not a whole Parquet file", "Write it again with pyarrow or pandas.")
    return DataFacts(None, None)


def _count_table(path: str, lines: Iterable[tuple[int, str]]) -> DataFacts:
    table = csv.DictReader((f"{line}\n" for _, line in lines), strict=True)
    rows = labels = 0
    try:
        for row in table:
            if not isinstance(row.get("text"), str):
                raise _invalid(
                    path,
                    f"line {table.line_num} has no `text`",
                    "Name the columns `text` and `label` in its first line.",
                )
            label = str(row.get("label") or "").strip()
            rows += 1
            labels = max(labels, int(label) + 1 if label.isdigit() and int(label) <= _MAX_LABEL else 0)
    except csv.Error as error:
        raise _invalid(path, f"line {table.line_num} is no CSV: {error}", "Quote texts that hold commas.") from error
    if rows == 0:
        raise _invalid(path, "it has no row below its header", "A data set needs at least one row.")
    return DataFacts(rows, labels)


def _count_rows(path: str, lines: Iterable[tuple[int, str]]) -> DataFacts:
    rows, labels, labelled = 0, 0, None
    for number, line in lines:
        if not line.strip():
            continue
        label = _label_of(path, number, line)
        if labelled is None:
            labelled = label is not None
        if labelled != (label is not None):
            raise _invalid(path, f"line {number} {'has no' if labelled else 'has a'} label, unlike those before it")
        rows += 1
        labels = max(labels, 0 if label is None else label + 1)
    return DataFacts(rows, labels)


def _label_of(path: str, number: int, line: str) -> int | None:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _invalid(path, f"line {number} is not JSON: {str(error)[:200]}") from error
    if isinstance(row, dict) and _OTHER_COLUMNS & row.keys():
        return None  # what each metric needs of them is checked when the job reads them
    says = isinstance(row, dict) and isinstance(row.get("text"), str) and row["text"].strip()
    if not says and not (isinstance(row, dict) and isinstance(row.get("messages"), list) and row["messages"]):
        raise _invalid(path, f"line {number} is not an object with a `text` that says something, or with `messages`")
    if "label" not in row:
        return None
    label = row["label"]
    if type(label) is not int or not 0 <= label <= _MAX_LABEL:
        raise _invalid(path, f"line {number}: `label` is not a whole number from 0 to {_MAX_LABEL}")
    return label


def _lines(path: str, pieces: Iterable[bytes]) -> Iterator[tuple[int, str]]:
    """Numbered lines. One of more than a megabyte is refused before it fills the memory; of prose it is just cut."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    prose = not path.removesuffix(".gz").endswith(".jsonl")
    number, rest = 0, ""
    for piece, final in _with_last(pieces):
        try:
            rest += decoder.decode(piece, final)
        except UnicodeDecodeError as error:
            raise _invalid(
                path, f"it is not UTF-8 after line {number}: {error.reason}", "Save the file as UTF-8."
            ) from error
        if "\0" in rest:
            raise _invalid(path, f"it has a NUL character after line {number}", "Bring text, not a binary file.")
        *whole, rest = rest.split("\n")
        for line in whole:
            number += 1
            yield number, line
        if len(rest) > _MAX_LINE:
            if not prose:
                raise _invalid(path, f"line {number + 1} is longer than {_MAX_LINE} characters")
            number += 1
            yield number, rest
            rest = ""
    if rest:
        yield number + 1, rest


def _with_last(pieces: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    for piece in pieces:
        for begin in range(0, len(piece), _PIECE):
            yield piece[begin : begin + _PIECE], False
    yield b"", True


def _unpacked(path: str, pieces: Iterable[bytes], limit: int) -> Iterator[bytes]:
    total = 0
    with gzip.GzipFile(fileobj=io.BufferedReader(_Pieces(pieces), _PIECE)) as source:
        while True:
            try:
                piece = source.read1(_PIECE)
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise _invalid(
                    path, f"it is not a whole gzip file: {error}", "Pack it again and compare checksums."
                ) from error
            if not piece:
                return
            total += len(piece)
            if total > limit:
                raise NightpressError(
                    ErrorCode.PAYLOAD_TOO_LARGE,
                    f"{path} unpacks to more than the {limit} bytes that are allowed here.",
                    hint="Bring less data, or ask the operator to raise the limit.",
                    file=path,
                )
            yield piece


class _Pieces(io.RawIOBase):
    """Bytes that come in pieces, as a file."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = memoryview(piece)
        count = min(len(target), len(self._rest))
        target[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def _invalid(path: str, why: str, hint: str = "docs/data.md shows what a data set looks like.") -> NightpressError:
    return NightpressError(ErrorCode.INVALID_DATA, f"{path}: {why}.", hint=hint, file=path)
