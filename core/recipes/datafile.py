"""Reads users' data sets: prose, JSONL and CSV, plain or packed by gzip. Registration and jobs use the same reader.

So a job never refuses the format of a registered data set. The cost is bounded: registration and jobs read at most the first 64 MiB and
the first million lines. Parquet needs a library that the API lacks: registration checks only the file's frame, and a worker passes its
rows to `row_of`.
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.jsonfile import is_text
from nightpress.core.recipes.labels import Label, LabelError, label_of, slice_of
from nightpress.core.recipes.textfile import MAX_LINE, Window, decoded, invalid, split, unpacked

Kind = Literal["txt", "jsonl", "csv", "parquet"]
Value = TypeVar("Value")

#: Columns that mark a row for a metric that reads more than a text; see docs/evaluation.md.
_OTHER_COLUMNS = frozenset({"text_a", "sentence1", "text1", "query", "anchor", "question", "prompt", "tokens", "words"})

#: What templates read of a turn beside its role and content.
_TURN_KEYS = ("name", "reasoning_content", "thinking", "tool_call_id", "tool_calls")
_HINT = "docs/how-to/bring-your-data.md shows what a data set looks like."
_CONVERSATION = 'Write {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}.'


@dataclass(frozen=True)
class DataRow:
    """A row, or a paragraph of prose. A row has a text, a conversation, or columns that only some metrics read."""

    place: str  #: place in the file for error messages, e.g. "line 3"
    values: Mapping[str, Any]  #: all columns; of a CSV only `text`, `label` and `slice`
    text: str | None = None
    messages: tuple[Mapping[str, Any], ...] = ()  #: turns with `role`, `content`, and what else templates read of them
    tools: tuple[Any, ...] = ()  #: the functions that the conversation may call, as the template describes them
    label: Label | None = None
    slice: str | None = None  #: the part of the data that the row belongs to, e.g. "code"


def kind_of(name: str) -> Kind:
    """Return the kind of a file from its name alone, so that the result is the same everywhere.

    Raises NightpressError(unsupported_format) for any other name.
    """
    if name.endswith(".parquet") and "/" not in name:
        return "parquet"
    plain = name.removesuffix(".gz")
    for kind in ("txt", "jsonl", "csv") if "/" not in name else ():
        if plain.endswith(f".{kind}"):
            return kind
    raise NightpressError(
        ErrorCode.UNSUPPORTED_FORMAT,
        f"{name[:200]} is not a kind of file that a data set is here.",
        hint="Bring one .txt, .jsonl or .csv file, plain or as .gz, or one .parquet file.",
        file=name,
    )


def read_data(ref: str, name: str, pieces: Iterable[bytes], window: Window | None = None) -> Iterator[DataRow]:
    """Yield the rows of a file that is not Parquet, without blank rows.

    ref: the data set's name in errors. Raises NightpressError(invalid_data) that names the faulty line.
    """
    window = window or Window()
    texts = decoded(ref, unpacked(ref, pieces) if name.endswith(".gz") else pieces, window)
    match kind_of(name):
        case "csv":
            return _table(ref, texts, window)
        case "jsonl":
            return _objects(ref, texts, window)
        case _:
            return _paragraphs(texts, window)


def row_of(ref: str, place: str, values: Mapping[str, Any]) -> DataRow | None:
    """Make a row from its columns. None: the row is blank. Raises NightpressError(invalid_data) for invalid columns."""
    row = _row(ref, place, values)
    if row is None or values.get("slice") is None:
        return row
    return replace(row, slice=_checked(ref, place, "slice", slice_of, values))


def _row(ref: str, place: str, values: Mapping[str, Any]) -> DataRow | None:
    text = values.get("text")
    if not _OTHER_COLUMNS.isdisjoint(values):
        # Each metric checks these columns when it reads them.
        found = values.get("label")
        plain = found if isinstance(found, int | str) and not isinstance(found, bool) else None
        return DataRow(place, values, text if isinstance(text, str) else None, label=plain)
    label = _checked(ref, place, "label", label_of, values)
    if values.get("messages") is not None:
        messages = _messages(ref, place, values["messages"])
        says = any(message["content"].strip() or message.get("tool_calls") for message in messages)
        tools = tools_of(ref, place, values.get("tools"))
        return DataRow(place, values, messages=messages, tools=tools, label=label) if says else None
    if isinstance(text, str):
        return DataRow(place, values, text, label=label) if text.strip() else None
    if text is None and ("text" in values or "messages" in values):
        return None
    what = "has no `text`" if text is None else "has a `text` that is no text"
    raise invalid(
        ref, f"{place} {what}", f'Give each row a `text`, or `messages` as [{{"role": …, "content": …}}]. {_HINT}'
    )


def _checked(ref: str, place: str, column: str, read: Callable[[object], Value], values: Mapping[str, Any]) -> Value:
    """Read a column. Raises NightpressError(invalid_data) for a value that it can't have."""
    try:
        return read(values.get(column))
    except LabelError as error:
        raise invalid(ref, f"{place}: `{column}` {error}", error.hint) from None


def _messages(ref: str, place: str, raw: object) -> tuple[Mapping[str, Any], ...]:
    turns = [_turn(row) for row in raw] if isinstance(raw, list) else []
    found = tuple(turn for turn in turns if turn is not None)
    if not found or len(found) < len(turns):
        raise invalid(ref, f"{place}: `messages` is no list of objects with a `role` and a `content`", _CONVERSATION)
    return found


def tools_of(ref: str, place: str, raw: object) -> tuple[Any, ...]:
    """Return the functions of a row: a list, or a list as JSON, as many data sets have it. Raises NightpressError(invalid_data)."""
    if isinstance(raw, str):
        try:
            raw = json.loads(raw) if raw.strip() else None
        except (ValueError, RecursionError):
            raw = 0
    if raw is None:
        return ()
    if not isinstance(raw, list) or not all(isinstance(tool, dict) for tool in raw):
        raise invalid(
            ref,
            f"{place}: `tools` is no list of functions, nor one as JSON",
            "Leave the column out, or write what the template reads.",
        )
    return tuple(raw)


def _turn(raw: object) -> Mapping[str, Any] | None:
    """Return a turn of a conversation; None: the value is no turn. Null content, as in turns that call tools, becomes an empty text."""
    if not isinstance(raw, dict) or not isinstance(raw.get("role"), str):
        return None
    content = raw.get("content", 0)
    if content is not None and not isinstance(content, str):
        return None
    more = {key: raw[key] for key in _TURN_KEYS if raw.get(key)}
    return {"role": raw["role"], "content": content or "", **more}


# Formats -------------------------------------------------------------------------------------------------------------


def _paragraphs(texts: Iterator[str], window: Window) -> Iterator[DataRow]:
    for _, part in split(texts, "\n\n", window):
        text = part.strip("\n")
        for at in range(0, len(text), MAX_LINE):
            if (piece := text[at : at + MAX_LINE]).strip():
                yield DataRow("", {"text": piece}, piece)


def _objects(ref: str, texts: Iterator[str], window: Window) -> Iterator[DataRow]:
    for number, line in split(texts, "\n", window):
        if len(line) > MAX_LINE:
            raise invalid(ref, f"line {number} is longer than {MAX_LINE} characters", "Cut its texts.")
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise invalid(
                ref,
                f"line {number} is not JSON ({str(error)[:100]})",
                f"Write one JSON object a line, with a `text`. {_HINT}",
            ) from error
        if "\\u" in line and not _all_text(values):  # lone surrogates and NUL can only come from escapes
            raise invalid(ref, f"line {number} has characters that are no text", "Leave out the escape.")
        if not isinstance(values, dict):
            raise invalid(ref, f"line {number} is no JSON object", 'Write lines like {"text": "…", "label": 1}.')
        if (row := row_of(ref, f"line {number}", values)) is not None:
            yield row


def _all_text(value: object) -> bool:
    """Return whether a tokenizer accepts every string in the value, keys included."""
    level = [value]
    while level:
        value = level.pop()
        if isinstance(value, str) and not is_text(value):
            return False
        if isinstance(value, dict):
            level += value
            level += value.values()
        elif isinstance(value, list):
            level += value
    return True


def _table(ref: str, texts: Iterator[str], window: Window) -> Iterator[DataRow]:
    feed = _Feed(ref, split(texts, "\n", window))
    table = csv.reader(feed, strict=True)
    try:
        names = next(table, None)
        for fields in table:
            feed.length = 0
            if not fields or names is None:
                continue
            cells = dict(zip(names, [*fields, *[None] * (len(names) - len(fields))], strict=False))
            values: dict[str, Any] = {name: cells[name] for name in cells.keys() & {"text", "label", "slice"}}
            if (row := row_of(ref, f"line {table.line_num}", values)) is not None:
                yield row
    except csv.Error as error:
        if window.cut:
            return  # the window cut the file inside quotes
        raise invalid(
            ref,
            f"its CSV can't be read at line {table.line_num} ({error})",
            "Quote texts that hold commas or line breaks, and double the quotes in them.",
        ) from error


class _Feed:
    """Lines for the CSV reader. The reader joins lines while a quote is open, so this limits the length of a row."""

    def __init__(self, ref: str, lines: Iterator[tuple[int, str]]) -> None:
        self._ref = ref
        self._lines = lines
        self.length = 0  #: characters since the last whole row

    def __iter__(self) -> "_Feed":
        return self

    def __next__(self) -> str:
        number, line = next(self._lines)
        self.length += len(line) + 1
        if self.length > MAX_LINE:
            hint = "Is a quote not closed? Cut longer texts."
            raise invalid(self._ref, f"the row that ends at line {number} is longer than {MAX_LINE} characters", hint)
        return f"{line}\n"


# Registration --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataFacts:
    rows: int | None  #: number of rows that jobs read; for prose, lines; None: unknown
    #: Number of classes: the highest label plus 1, or the number of names; 1 for numbers to be predicted; 0: no labels; None: unknown.
    labels: int | None


def examine_data(path: str, pieces: Iterable[bytes], window: Window | None = None) -> DataFacts:
    """Read the same part of a file as a job would. Raises NightpressError(invalid_data) that names the faulty line."""
    kind = kind_of(path)
    if kind == "parquet":
        return _look_at_parquet(path, pieces)
    rows = highest = 0
    names: set[str] = set()
    labelled: bool | None = None
    for row in read_data(path, path, pieces, window):
        rows += 1 if kind != "txt" or row.text is None else row.text.count("\n") + 1
        if not _OTHER_COLUMNS.isdisjoint(row.values):
            continue
        labelled = row.label is not None if labelled is None else labelled
        if labelled != (row.label is not None):
            why = f"{row.place} {'has no' if labelled else 'has a'} label, unlike those before it"
            raise invalid(path, why, "Give every row a label, or none.")
        for label in row.label if isinstance(row.label, tuple) else (row.label,):
            if isinstance(label, str):
                names.add(label)
            elif isinstance(label, int):
                highest = max(highest, label + 1)
    if rows == 0:
        raise invalid(path, "no line of it says anything", f"A data set needs at least one line of text. {_HINT}")
    return DataFacts(rows, max(highest, len(names), int(bool(labelled))))


def _look_at_parquet(path: str, pieces: Iterable[bytes]) -> DataFacts:
    first, last, size = b"", b"", 0
    for piece in pieces:
        first = (first + piece[:4])[:4]
        last = (last + piece[-8:])[-8:]
        size += len(piece)
    footer = int.from_bytes(last[:4], "little")
    if first != b"PAR1" or last[4:] != b"PAR1" or footer > size - 12:
        raise invalid(path, "it is not a whole Parquet file", "Write it again with pyarrow or pandas.")
    return DataFacts(None, None)
