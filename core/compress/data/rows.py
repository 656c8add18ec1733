"""The rows of a data set: built-in prose, text, JSONL, CSV or Parquet; conversations as the model's chat template renders them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from nightpress.core.compress.data.chat import render_conversations
from nightpress.core.recipes.datafile import READ_BYTES, READ_LINES, DataRow, invalid, kind_of, read_data, row_of

_PROSE = {"evaluation": "prose_evaluation.txt.gz", "calibration": "prose_calibration.txt.gz"}
_BATCH_ROWS = 1024
_PIECE = 256 * 1024


@dataclass(frozen=True)
class Row:
    text: str
    label: int | str | None = None


def read_rows(ref: str, file: Path | None, *, purpose: str = "evaluation", model_dir: Path | None = None) -> list[Row]:
    """The rows of a data set: paragraphs of prose, or rows with a `text`, or with `messages` if the model in model_dir has a chat template.

    Raises NightpressError(invalid_data) with the row at fault.
    """
    if ref.startswith("builtin:"):
        return [Row(row.text or "") for row in read_data(ref, _PROSE[purpose], [builtin_bytes(purpose)])]
    rows = _render(ref, list(_rows_of_file(ref, find_file(ref, file))), model_dir)
    if not rows:
        raise invalid(ref, "it holds no text", "Bring a file with prose, or with one JSON object a line.")
    return rows


def read_records(ref: str, file: Path | None) -> list[dict[str, Any]]:
    """The rows of a JSONL file with all their columns. Raises NightpressError(invalid_data)."""
    file = find_file(ref, file)
    if kind_of(file.name) != "jsonl":
        raise invalid(ref, "it is not JSONL, and this metric reads more than a `text`", "Write one JSON object a line.")
    return [dict(row.values) for row in read_data(ref, file.name, _pieces(file))]


def has_columns(ref: str, file: Path | None, names: Iterable[str]) -> bool:
    """Whether its first row has one of these columns. Of Parquet and CSV only `text`, `messages` and `label` are read."""
    if file is None or not file.is_file() or kind_of(file.name) != "jsonl":
        return False
    first = next(read_data(ref, file.name, _pieces(file)), None)
    return first is not None and any(name in first.values for name in names)


def builtin_bytes(purpose: str) -> bytes:
    """The built-in prose for a purpose as it is shipped, packed."""
    return (files("nightpress.core.compress.data") / _PROSE[purpose]).read_bytes()


def is_parquet(file: Path) -> bool:
    return kind_of(file.name) == "parquet"


def find_file(ref: str, file: Path | None) -> Path:
    """Raises NightpressError(invalid_data) if the job was not given the data set's file."""
    if file is None or not file.is_file():
        raise invalid(ref, "its file was not handed to the job", "Register the data set again.")
    return file


def parquet_rows(ref: str, file: Path, wanted: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Those of the wanted columns that a Parquet file has, row by row. Raises NightpressError(invalid_data)."""
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
        # A text that stands in a million rows is held once, and copied only where its row is asked for.
        with ParquetFile(file, read_dictionary=[name for name in columns if name == "text"]) as table:
            for batch in table.iter_batches(_BATCH_ROWS, columns=columns) if columns else ():
                for at in range(batch.num_rows):
                    yield {name: column[at].as_py() for name, column in zip(columns, batch.columns, strict=True)}
    except (
        ArrowException,
        OSError,
        ValueError,
        OverflowError,
    ) as error:  # the last two: not UTF-8, times beyond Python's
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
    for number, values in enumerate(parquet_rows(ref, file, ("text", "label", "messages")), 1):
        size += len(str(values))
        if size > READ_BYTES or number > READ_LINES:
            return
        row = row_of(ref, f"row {number}", values)
        if row is not None:
            yield row


def _render(ref: str, raw: list[DataRow], model_dir: Path | None) -> list[Row]:
    """Rows with their texts; conversations go through the model's template together."""
    conversations = {at: row.messages for at, row in enumerate(raw) if row.messages}
    if conversations and model_dir is None:
        raise invalid(ref, "it holds conversations, which are not read here", "Bring rows with a `text`.")
    rendered: dict[int, str] = {}
    if conversations:
        assert model_dir is not None
        texts = render_conversations(list(conversations.values()), model_dir, ref=ref)
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
            rows.append(Row(text, row.label))
    return rows
