"""Projects Parquet files without decoding a value: the bytes of some columns are copied, and a new footer describes them.

So the control process needs no Parquet library, fetches the needed columns alone, and opens nothing that somebody else made. A job's child
decodes the result. Format: https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nightpress.core.errors import NightpressError
from nightpress.core.recipes.textfile import READ_BYTES, READ_LINES, invalid
from nightpress.core.sources.address import SplitChoice
from nightpress.core.sources.thrift import (
    BINARY,
    I16,
    I32,
    I64,
    LIST,
    STRUCT,
    Items,
    Struct,
    ThriftError,
    read_struct,
    write_struct,
)

MAGIC = b"PAR1"
TAIL = 8  #: bytes at a file's end: the footer's length, and the magic
MAX_FOOTER = 16 * 1024**2

# Numbers of fields.
_SCHEMA, _ROWS, _GROUPS, _ENCRYPTED = 2, 3, 4, 8  # FileMetaData
_NAME, _CHILDREN = 4, 5  # SchemaElement
_COLUMNS, _GROUP_BYTES, _GROUP_ROWS, _GROUP_OFFSET, _GROUP_PACKED = 1, 2, 3, 5, 6  # RowGroup
_FILE, _CHUNK_OFFSET, _META, _CRYPTO = 1, 2, 3, 8  # ColumnChunk
_TYPE, _ENCODINGS, _PATH, _CODEC, _VALUES, _BYTES, _PACKED, _DATA, _DICTIONARY = (
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    9,
    11,
)  # ColumnMetaData
_COPIED = (_TYPE, _ENCODINGS, _CODEC, _VALUES, _BYTES, _PACKED)


@dataclass(frozen=True)
class Piece:
    """Bytes to copy: [start, end) of the file with this index."""

    file: int
    start: int
    end: int


@dataclass(frozen=True)
class Projection:
    """A Parquet file that consists of pieces of others, between its magic and its footer."""

    pieces: tuple[Piece, ...]
    footer: bytes  #: with its length and the magic behind it
    rows: int

    @property
    def size(self) -> int:
        return len(MAGIC) + sum(piece.end - piece.start for piece in self.pieces) + len(self.footer)


class Projector:
    """Takes the footers of a split's files one after the other, until the result holds all that a job would read."""

    def __init__(self, ref: str, choice: SplitChoice) -> None:
        """ref: the data set's name in errors."""
        self._ref = ref
        self._choice = choice
        self._columns = choice.columns
        self._schema: list[Struct] = []
        self._groups: list[Struct] = []
        self._pieces: list[Piece] = []
        self._at = len(MAGIC)
        self._rows = self._bytes = 0

    @property
    def is_full(self) -> bool:
        """Whether a job would read no further: its limits are `READ_BYTES` and `READ_LINES`."""
        return self._rows >= READ_LINES or self._bytes > READ_BYTES

    def add(self, index: int, name: str, size: int, footer: bytes) -> None:
        """Take the needed columns of a file. size: of the file in bytes. Raises NightpressError(invalid_data)."""
        try:
            self._add(index, name, size, read_struct(footer))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise invalid(
                self._ref, f"the footer of {name} can't be read ({error})"[:300], "Write it again with pyarrow."
            ) from error

    def done(self) -> Projection:
        """Raises NightpressError(invalid_data) if there are no rows."""
        if not self._rows:
            raise invalid(self._ref, "its split holds no rows", "Name another split.")
        footer = write_struct(
            {
                1: (I32, 2),
                _SCHEMA: (LIST, Items(STRUCT, self._schema)),
                _ROWS: (I64, self._rows),
                _GROUPS: (LIST, Items(STRUCT, self._groups)),
                6: (BINARY, b"nightpress"),
            }
        )
        return Projection(tuple(self._pieces), footer + len(footer).to_bytes(4, "little") + MAGIC, self._rows)

    def _add(self, index: int, name: str, size: int, meta: Struct) -> None:
        if _ENCRYPTED in meta:
            raise invalid(self._ref, f"{name} is encrypted", "Bring it decrypted.")
        schema = _projected(_items(meta, _SCHEMA), self._columns)
        there = [_text(found, _NAME) for found in _top(_items(meta, _SCHEMA))]
        if missing := self._choice.missing(there):
            raise missing_columns(self._ref, name, missing, there)
        if self._schema and schema != self._schema:
            raise invalid(
                self._ref,
                f"the columns of {name} are of other types than those of the files before it",
                "Bring one kind of file.",
            )
        self._schema = schema
        for group in _items(meta, _GROUPS):
            if self.is_full:
                return
            self._take(index, name, size, group)

    def _take(self, index: int, name: str, size: int, group: Struct) -> None:
        chunks, begin, packed, unpacked = [], self._at, 0, 0
        renamed = {stored.encode(): wanted.encode() for wanted, stored in self._columns.items()}
        for chunk in _items(group, _COLUMNS):
            meta = chunk[_META][1]
            path = [bytes(part) for part in meta[_PATH][1].values]
            if path[0] not in renamed:
                continue
            if _FILE in chunk or _CRYPTO in chunk:
                raise invalid(
                    self._ref, f"{name} keeps columns in other files, or encrypted", "Write it again with pyarrow."
                )
            dictionary = meta.get(_DICTIONARY, (I64, 0))[1]
            data, length = meta[_DATA][1], meta[_PACKED][1]
            start = dictionary if 0 < dictionary < data else data
            if not (len(MAGIC) <= start and 0 < length <= size - start):
                raise invalid(
                    self._ref, f"the footer of {name} names bytes that are not in the file", "Write it again."
                )
            moved: Struct = {field: meta[field] for field in _COPIED}
            moved[_PATH] = (LIST, Items(BINARY, [renamed[path[0]], *path[1:]]))
            moved[_DATA] = (I64, data - start + self._at)
            if start == dictionary:
                moved[_DICTIONARY] = (I64, self._at)
            chunks.append({_CHUNK_OFFSET: (I64, 0), _META: (STRUCT, moved)})
            self._pieces.append(Piece(index, start, start + length))
            self._at += length
            packed, unpacked = packed + length, unpacked + int(meta[_BYTES][1])
        rows = int(group[_GROUP_ROWS][1])
        if rows < 0 or unpacked < 0:
            raise ThriftError("it counts less than nothing")
        self._rows, self._bytes = self._rows + rows, self._bytes + unpacked
        self._groups.append(
            {
                _COLUMNS: (LIST, Items(STRUCT, chunks)),
                _GROUP_BYTES: (I64, unpacked),
                _GROUP_ROWS: (I64, rows),
                _GROUP_OFFSET: (I64, begin),
                _GROUP_PACKED: (I64, packed),
                7: (I16, len(self._groups)),
            }
        )


def missing_columns(ref: str, file: str, missing: Sequence[str], there: Sequence[str]) -> NightpressError:
    return invalid(
        ref,
        f"{file} has no column {' or '.join(missing)}; it has {', '.join(there)[:500]}",
        "Say which column is the text: `columns=text:NAME,label:NAME` behind the `?` of the address.",
    )


def _projected(schema: list[Struct], columns: Mapping[str, str]) -> list[Struct]:
    """The schema with the wanted columns under their new names. A schema lists its tree depth first, the root first."""
    renamed = {stored: wanted for wanted, stored in columns.items()}
    root, kept = schema[0], []
    for column in _top(schema):
        at = next(index for index, found in enumerate(schema) if found is column)
        name = _text(column, _NAME)
        if name in renamed:
            kept.append({**column, _NAME: (BINARY, renamed[name].encode())})
            kept += schema[at + 1 : _end(schema, at)]
    count = sum(_text(column, _NAME) in renamed for column in _top(schema))
    return [{**root, _CHILDREN: (I32, count)}, *kept]


def _top(schema: list[Struct]) -> list[Struct]:
    found, at = [], 1
    while at < len(schema):
        found.append(schema[at])
        at = _end(schema, at)
    return found


def _end(schema: list[Struct], at: int) -> int:
    """The index behind a column and all below it."""
    left = 1
    while left:
        left += int(schema[at].get(_CHILDREN, (I32, 0))[1]) - 1
        at += 1
    return at


def _items(struct: Struct, field: int) -> list[Any]:
    values: list[Any] = struct[field][1].values
    return values


def _text(struct: Struct, field: int) -> str:
    return str(struct[field][1].decode())
