"""The rows of a data set: built-in prose, text, JSONL, CSV or Parquet; conversations as the model's chat template renders them."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from core.compress.evaluate.chat import render_conversations
from core.errors import ErrorCode, NightpressError

MAX_TEXT_BYTES = 64 * 1024**2  #: what of a data set is looked at; a quality figure needs far less
_PROSE = {"evaluation": "prose_evaluation.txt.gz", "calibration": "prose_calibration.txt.gz"}
_BATCH_ROWS = 1024


@dataclass(frozen=True)
class Row:
    text: str
    label: int | str | None = None


def read_rows(ref: str, file: Path | None, *, purpose: str = "evaluation", model_dir: Path | None = None) -> list[Row]:
    """The rows of a data set: paragraphs of prose, or rows with a `text`, or with `messages` if the model in model_dir has a chat template.

    Raises NightpressError(invalid_data) with the row at fault.
    """
    if ref.startswith("builtin:"):
        return _paragraphs(gzip.decompress(builtin_bytes(purpose)).decode())
    rows = _render(ref, list(_raw_rows(ref, find_file(ref, file))), model_dir)
    if not rows:
        raise invalid(ref, "it holds no text", "Bring a file with prose, or with one JSON object a line.")
    return rows


def read_records(ref: str, file: Path | None) -> list[dict[str, Any]]:
    """The objects of a JSONL file, whatever their fields. Raises NightpressError(invalid_data)."""
    return [dict(one.values) for one in _objects(ref, read_text(ref, find_file(ref, file)))]


def builtin_bytes(purpose: str) -> bytes:
    """The built-in prose for a purpose as it is shipped, packed."""
    return (files("core.compress") / "data" / _PROSE[purpose]).read_bytes()


def is_parquet(file: Path) -> bool:
    with file.open("rb") as source:
        return source.read(4) == b"PAR1"


def find_file(ref: str, file: Path | None) -> Path:
    """Raises NightpressError(invalid_data) if the job was not given the data set's file."""
    if file is None or not file.is_file():
        raise invalid(ref, "its file was not handed to the job", "Register the data set again.")
    return file


def invalid(ref: str, what: str, hint: str) -> NightpressError:
    return NightpressError(ErrorCode.INVALID_DATA, f"The data set {ref} can't be used: {what}.", hint=hint, data=ref)


def parquet_batches(ref: str, file: Path, wanted: Iterable[str]) -> Iterator[list[dict[str, Any]]]:
    """Those of the wanted columns that a Parquet file has, some rows at a time. Raises NightpressError(invalid_data)."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise invalid(
            ref,
            "it is a Parquet file, and this worker has no pyarrow",
            "Install `nightpress[compress]` there, or bring JSONL.",
        ) from error
    try:
        with ParquetFile(file) as table:
            columns = [name for name in wanted if name in table.schema_arrow.names]
            for batch in table.iter_batches(_BATCH_ROWS, columns=columns) if columns else ():
                yield batch.to_pylist()
    except (ArrowException, OSError) as error:
        raise invalid(ref, f"its Parquet can't be read ({str(error)[:200]})", "Write it again.") from error


# Formats -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Raw:
    """A row as its file has it."""

    place: str  #: for a person who looks for it
    values: Mapping[str, Any]


def _raw_rows(ref: str, file: Path) -> Iterator[_Raw]:
    name = file.name.removesuffix(".gz")
    if is_parquet(file):
        yield from _parquet(ref, file)
        return
    text = read_text(ref, file)
    first = next((line for line in text.splitlines() if line.strip()), "")
    if name.endswith(".csv"):
        yield from _table(ref, text)
    elif first.lstrip().startswith("{"):
        yield from _objects(ref, text)
    else:
        yield from (_Raw("", {"text": row.text}) for row in _paragraphs(text))


def _parquet(ref: str, file: Path) -> Iterator[_Raw]:
    number = size = 0
    for batch in parquet_batches(ref, file, ("text", "label", "messages")):
        for values in batch:
            number += 1
            size += len(str(values))
            if size > MAX_TEXT_BYTES:
                return
            yield _Raw(f"row {number}", {key: one for key, one in values.items() if one is not None})


def _table(ref: str, text: str) -> Iterator[_Raw]:
    try:
        for number, values in enumerate(csv.DictReader(io.StringIO(text, newline=""), strict=True), 2):
            label = (values.get("label") or "").strip()
            kept: dict[str, Any] = {"text": values.get("text")}
            if label:
                kept["label"] = int(label) if label.isdigit() else label
            yield _Raw(f"line {number}", kept)
    except csv.Error as error:
        raise invalid(
            ref, f"its CSV can't be read ({error})", "Quote texts that hold commas or line breaks."
        ) from error


def _objects(ref: str, text: str) -> Iterator[_Raw]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise invalid(
                ref, f"line {number} is not JSON ({str(error)[:100]})", "Write one JSON object a line, with a `text`."
            ) from error
        if not isinstance(values, dict):
            raise invalid(ref, f"line {number} is no JSON object", 'Write lines like {"text": "…", "label": 1}.')
        yield _Raw(f"line {number}", values)


def _render(ref: str, raw: list[_Raw], model_dir: Path | None) -> list[Row]:
    """Rows with their texts; conversations go through the model's template together."""
    conversations = {at: _messages(ref, one) for at, one in enumerate(raw) if "messages" in one.values}
    if conversations and model_dir is None:
        raise invalid(ref, "it holds conversations, which are not read here", "Bring rows with a `text`.")
    rendered: dict[int, str] = {}
    if conversations:
        assert model_dir is not None
        texts = render_conversations(list(conversations.values()), model_dir, ref=ref)
        rendered = dict(zip(conversations, texts, strict=True))
    rows = []
    for at, one in enumerate(raw):
        text = rendered.get(at, one.values.get("text"))
        if not isinstance(text, str):
            raise invalid(
                ref,
                f"{one.place or 'it'} has no `text`",
                'Give each row a `text`, or `messages` as [{"role": …, "content": …}].',
            )
        label = one.values.get("label")
        if label is not None and (isinstance(label, bool) or not isinstance(label, int | str)):
            raise invalid(ref, f"{one.place}: `label` is neither a whole number nor a name", "Use the class's index.")
        if text.strip():
            rows.append(Row(text, label))
        elif label is not None:
            raise invalid(
                ref, f"{one.place}: `text` is empty, and has a label", "Leave the row out, or write its text."
            )
    return rows


def _messages(ref: str, row: _Raw) -> list[dict[str, str]]:
    messages = row.values["messages"]
    whole = isinstance(messages, list) and all(
        isinstance(one, dict) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)
        for one in messages
    )
    if not whole or not messages:
        raise invalid(
            ref,
            f"{row.place}: `messages` is no list of objects with a `role` and a `content`",
            'Write {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}.',
        )
    return [{"role": one["role"], "content": one["content"]} for one in messages]


def read_text(ref: str, file: Path) -> str:
    try:
        with file.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            data = gzip.GzipFile(fileobj=raw).read(MAX_TEXT_BYTES) if packed else raw.read(MAX_TEXT_BYTES)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise invalid(ref, f"its gzip stream is damaged ({error})", "Compress and bring it again.") from error
    cut = len(data) == MAX_TEXT_BYTES
    if cut:
        data = data[: data.rfind(b"\n") + 1]
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise invalid(ref, f"it is not UTF-8 at byte {error.start}", "Convert it to UTF-8.") from error


def _paragraphs(text: str) -> list[Row]:
    return [Row(part) for part in text.replace("\r\n", "\n").split("\n\n") if part.strip()]
