"""Reads the rows of a data set: built-in prose, text, JSONL, CSV or Parquet. The model's chat template renders conversations to text."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from nightpress.core.compress.data.chat import as_chats, chat_template, render_conversations
from nightpress.core.recipes.calibration import BUILTIN_DATA, SLICES
from nightpress.core.recipes.datafile import DataRow, kind_of, read_data, row_of
from nightpress.core.recipes.labels import Label
from nightpress.core.recipes.textfile import READ_BYTES, READ_LINES, invalid

_BATCH_ROWS = 1024
_PIECE = 256 * 1024


@dataclass(frozen=True)
class Row:
    text: str
    label: Label | None = None
    second: str | None = None  #: the second text of a pair
    slice: str | None = None  #: the part of the data set that the row belongs to; None: to none


def read_rows(ref: str, file: Path | None, *, purpose: str = "evaluation", model_dir: Path | None = None) -> list[Row]:
    """Read a data set's rows: paragraphs of prose, or rows with a `text` or with `messages`.

    `messages` need the chat template of the model in model_dir. Raises NightpressError(invalid_data) that names the wrong row.
    """
    if ref == SLICES:
        return _slices(model_dir)
    if ref.startswith("builtin:"):
        return [Row(row.text or "") for row in read_data(ref, _file_of(ref, purpose), [builtin_bytes(ref, purpose)])]
    rows = _render(ref, list(_rows_of_file(ref, find_file(ref, file))), model_dir)
    if not rows:
        raise invalid(ref, "it holds no text", "Bring a file with prose, or with one JSON object a line.")
    return rows


def _slices(model_dir: Path | None) -> list[Row]:
    """The built-in texts that measure, by kind: the slices `prose`, `code` and, for a model with a chat template, `chat`.

    The turns of the chats are paragraphs of the prose that the slice `prose` then lacks.
    """
    texts = {kind: [row.text for row in read_rows(f"builtin:{kind}", None)] for kind in ("prose", "code")}
    if model_dir is not None and chat_template(model_dir) is not None:
        middle = len(texts["prose"]) // 2
        texts["chat"] = as_chats(texts["prose"][middle:], model_dir, ref=SLICES)
        del texts["prose"][middle:]
    return [Row(text, slice=kind) for kind, some in texts.items() for text in some]


def read_records(ref: str, file: Path | None) -> list[dict[str, Any]]:
    """Read the rows of a JSONL file with all their columns. Raises NightpressError(invalid_data)."""
    file = find_file(ref, file)
    if kind_of(file.name) != "jsonl":
        raise invalid(ref, "it is not JSONL, and this metric reads more than a `text`", "Write one JSON object a line.")
    return [dict(row.values) for row in read_data(ref, file.name, _pieces(file))]


def has_columns(ref: str, file: Path | None, names: Iterable[str]) -> bool:
    """Whether the first row of a JSONL file has one of these columns. False for Parquet and CSV: their other columns are not read."""
    if file is None or not file.is_file() or kind_of(file.name) != "jsonl":
        return False
    first = next(read_data(ref, file.name, _pieces(file)), None)
    return first is not None and any(name in first.values for name in names)


def builtin_bytes(ref: str, purpose: str) -> bytes:
    """A built-in data set for `evaluation` or `calibration` as it is shipped: compressed with gzip. Raises NightpressError(invalid_data)."""
    return (files("nightpress.core.compress.data") / _file_of(ref, purpose)).read_bytes()


def _file_of(ref: str, purpose: str) -> str:
    if ref not in BUILTIN_DATA:
        raise invalid(ref, "no such data set is built in", f"Use {' or '.join(sorted(BUILTIN_DATA))}.")
    return f"{ref.removeprefix('builtin:')}_{purpose}.txt.gz"


def is_parquet(file: Path) -> bool:
    return kind_of(file.name) == "parquet"


def find_file(ref: str, file: Path | None) -> Path:
    """Return the data set's file. Raises NightpressError(invalid_data) if the job did not get it."""
    if file is None or not file.is_file():
        raise invalid(ref, "its file was not handed to the job", "Register the data set again.")
    return file


def parquet_rows(ref: str, file: Path, wanted: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Read a Parquet file row by row, with those of the wanted columns that the file has. Raises NightpressError(invalid_data)."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile, read_schema
    except ImportError as error:
        raise invalid(
            ref,
            "it is a Parquet file, and this worker has no pyarrow",
            "Install `nightpress[compress]` there, or bring JSONL.",
        ) from error
    try:
        columns = [name for name in wanted if name in read_schema(file).names]
        # Dictionary encoding holds a text once, even if a million rows repeat it. It is copied only when its row is read.
        with ParquetFile(file, read_dictionary=[name for name in columns if name == "text"]) as table:
            for batch in table.iter_batches(_BATCH_ROWS, columns=columns) if columns else ():
                for at in range(batch.num_rows):
                    yield {name: column[at].as_py() for name, column in zip(columns, batch.columns, strict=True)}
    # ValueError: the text is not UTF-8. OverflowError: a time is outside Python's range.
    except (ArrowException, OSError, ValueError, OverflowError) as error:
        raise invalid(ref, f"its Parquet can't be read ({str(error)[:200]})", "Write it again.") from error


def _rows_of_file(ref: str, file: Path) -> Iterator[DataRow]:
    if is_parquet(file):
        return _parquet(ref, file)
    return read_data(ref, file.name, _pieces(file))


def _pieces(file: Path) -> Iterator[bytes]:
    with file.open("rb") as source:
        while piece := source.read(_PIECE):
            yield piece


def _parquet(ref: str, file: Path) -> Iterator[DataRow]:
    size = 0
    for number, values in enumerate(parquet_rows(ref, file, ("text", "label", "messages", "slice", "tools")), 1):
        size += len(str(values))
        if size > READ_BYTES or number > READ_LINES:
            return
        row = row_of(ref, f"row {number}", values)
        if row is not None:
            yield row


def _render(ref: str, raw: list[DataRow], model_dir: Path | None) -> list[Row]:
    """Rows with their texts. All conversations are rendered in one call of the model's template."""
    conversations = {at: row.messages for at, row in enumerate(raw) if row.messages}
    if conversations and model_dir is None:
        raise invalid(ref, "it holds conversations, which are not read here", "Bring rows with a `text`.")
    rendered: dict[int, str] = {}
    if conversations:
        assert model_dir is not None
        tools = [raw[at].tools for at in conversations]
        texts = render_conversations(list(conversations.values()), model_dir, ref=ref, tools=tools)
        rendered = dict(zip(conversations, texts, strict=True))
    rows = []
    for at, row in enumerate(raw):
        text = rendered.get(at, row.text)
        if text is None:
            raise invalid(
                ref,
                f"{row.place or 'it'} has no `text`",
                'Give each row a `text`, or `messages` as [{"role": …, "content": …}].',
            )
        if text.strip():
            rows.append(Row(text, row.label, slice=row.slice))
    return rows
