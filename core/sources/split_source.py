"""A split of a data set repository of the Hub, read as if it were one file: the rows of all its files, in the chosen columns.

Parquet: the needed columns are copied and never decoded. Lines: JSONL and CSV become JSONL, text stays text. Only as much is fetched as a job reads.
"""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing

from nightpress.core.recipes.textfile import MAX_LINE, READ_BYTES, READ_LINES, Window, decoded, invalid, split, unpacked
from nightpress.core.sources.address import HubAddress, SplitChoice
from nightpress.core.sources.hub import HubSource
from nightpress.core.sources.parquet import MAGIC, MAX_FOOTER, TAIL, Piece, Projection, Projector, missing_columns
from nightpress.core.sources.source import Listing, RemoteFile, unavailable
from nightpress.core.sources.splits import README, files_of_split

_MAX_README = 1024**2
_MOST_READ = 512 * 1024**2  #: unpacked bytes of a file of lines that are searched for the chosen columns


class SplitSource:
    """A source with a single file. Its listing reads the README and the files' footers, or, for lines, the rows themselves."""

    def __init__(self, address: HubAddress, choice: SplitChoice, hub: HubSource) -> None:
        self._address = address
        self._choice = choice
        self._hub = hub
        self._files: Sequence[RemoteFile] = ()
        self._content: Projection | bytes = b""

    def close(self) -> None:
        self._hub.close()

    def listing(self) -> Listing:
        """The split as one file. Raises NightpressError as all sources do, and invalid_data for files that can't be read."""
        every = self._hub.listing()
        by_path = {file.path: file for file in every.files}
        readme = by_path.get(README)
        text = None if readme is None or readme.size > _MAX_README else self._read(readme).decode(errors="replace")
        paths = files_of_split(by_path, text, self._choice.config, self._choice.split)
        self._files = [by_path[path] for path in paths]
        name = self._choice.split
        if paths[0].endswith(".parquet"):
            self._content = self._project()
            size, name = self._content.size, f"{name}.parquet"
        else:
            lines = self._text() if paths[0].removesuffix(".gz").endswith(".txt") else self._rows()
            self._content = b"".join(lines)
            size = len(self._content)
            name += ".txt" if paths[0].removesuffix(".gz").endswith(".txt") else ".jsonl"
        return Listing(every.revision, (RemoteFile(name, size, every.revision),))

    def read(self, file: RemoteFile, start: int) -> Iterator[bytes]:  # noqa: ARG002 - it is the only file
        if isinstance(self._content, bytes):
            yield self._content[start:]
            return
        at = 0
        parts: tuple[bytes | Piece, ...] = (MAGIC, *self._content.pieces, self._content.footer)
        for part in parts:
            size = len(part) if isinstance(part, bytes) else part.end - part.start
            skipped = min(max(start - at, 0), size)
            at += size
            if skipped == size:
                continue
            if isinstance(part, bytes):
                yield part[skipped:]
            else:
                yield from self._hub.read(self._files[part.file], part.start + skipped, part.end)

    def _project(self) -> Projection:
        projector = Projector(self._address.url, self._choice)
        for index, file in enumerate(self._files):
            if projector.is_full:
                break
            tail = self._read(file, max(file.size - TAIL, 0))
            length = int.from_bytes(tail[:4], "little")
            if tail[4:] != MAGIC or not 0 < length <= min(file.size - TAIL - len(MAGIC), MAX_FOOTER):
                raise invalid(
                    self._address.url, f"{file.path} is not a whole Parquet file", "Write it again with pyarrow."
                )
            end = file.size - TAIL
            projector.add(index, file.path, file.size, self._read(file, end - length, end))
        return projector.done()

    def _read(self, file: RemoteFile, start: int = 0, end: int | None = None) -> bytes:
        found = b"".join(self._hub.read(file, start, end))
        if len(found) != (file.size if end is None else end) - start:
            raise unavailable(file.path, "it ended too soon")
        return found

    def _pieces(self, file: RemoteFile) -> Iterator[bytes]:
        """The decoded rows of a file. Closing the generator ends the download."""
        with closing(self._hub.read(file, 0)) as pieces:
            yield from unpacked(self._address.url, pieces) if file.path.endswith(".gz") else pieces

    def _text(self) -> Iterator[bytes]:
        left = READ_BYTES
        for file in self._files:
            for text in decoded(self._address.url, self._pieces(file), Window(size=left)):
                left -= len(text.encode())
                yield text.encode()
            if left <= 0:
                return
            yield b"\n\n"  # a file's end ends a paragraph

    def _rows(self) -> Iterator[bytes]:
        """JSON lines with the chosen columns alone, as many as a job reads."""
        ref, columns, left, rows = self._address.url, self._choice.columns, READ_BYTES, READ_LINES
        for file in self._files:
            window = Window(size=_MOST_READ)
            lines = (line for _, line in split(decoded(ref, self._pieces(file), window), "\n", window))
            is_csv = file.path.removesuffix(".gz").endswith(".csv")
            for number, values in enumerate((_csv_rows if is_csv else _json_rows)(ref, file.path, lines)):
                if number == 0 and (missing := self._choice.missing(values)):
                    raise missing_columns(ref, file.path, missing, list(values))
                row = {name: values[stored] for name, stored in columns.items() if stored in values}
                line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
                left, rows = left - len(line), rows - 1
                if left < 0 or rows < 0:
                    return
                yield line


def _json_rows(ref: str, file: str, lines: Iterator[str]) -> Iterator[Mapping[str, object]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line) if len(line) <= MAX_LINE else None
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise invalid(
                ref, f"line {number} of {file} is no JSON object of at most {MAX_LINE} characters", "Write one a line."
            )
        yield values


def _csv_rows(ref: str, file: str, lines: Iterator[str]) -> Iterator[Mapping[str, object]]:
    table = csv.DictReader((f"{line}\n" for line in lines), strict=True)
    try:
        for values in table:
            yield {name: value for name, value in values.items() if name is not None}
    except csv.Error as error:
        raise invalid(
            ref, f"{file} can't be read at line {table.line_num} ({error})", "Quote texts that hold commas."
        ) from error
