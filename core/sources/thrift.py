"""Reads and writes values in Thrift's compact protocol, in which Parquet keeps its footer. Nothing is known here of what they mean.

https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

from dataclasses import dataclass
from typing import Any

TRUE, FALSE, I16, I32, I64, BINARY, LIST, STRUCT = 1, 2, 4, 5, 6, 8, 9, 12
_BYTE, _DOUBLE, _SET, _MAP, _UUID = 3, 7, 10, 11, 13
_STOP = 0
_MAX_DEPTH = 32
_MAX_VALUES = 4_000_000  #: values of a footer: some ten seconds of reading


@dataclass(frozen=True)
class Items:
    """A list. kind: of its items."""

    kind: int
    values: list[Any]


#: A struct: number of a field → (kind, value). A list is Items, a struct another Struct, text is bytes.
Struct = dict[int, tuple[int, Any]]


class ThriftError(ValueError):
    """The bytes are no struct in this protocol."""


def read_struct(data: bytes) -> Struct:
    """Raises ThriftError."""
    try:
        return _Reader(data).struct(0)
    except IndexError as error:
        raise ThriftError("it ends too soon") from error


def write_struct(struct: Struct) -> bytes:
    out = bytearray()
    _write(out, STRUCT, struct)
    return bytes(out)


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self._left = _MAX_VALUES

    def struct(self, depth: int) -> Struct:
        found: Struct = {}
        field = 0
        while (head := self._byte()) != _STOP:
            field = field + (head >> 4) if head >> 4 else _unzigzag(self._varint())
            kind = head & 15
            found[field] = (kind, None if kind in {TRUE, FALSE} else self._value(kind, depth))
        return found

    def _value(self, kind: int, depth: int) -> Any:
        self._left -= 1
        if depth > _MAX_DEPTH or self._left < 0:
            raise ThriftError("it is nested too deeply, or too long")
        if kind in {TRUE, FALSE, _BYTE}:
            return self._byte()
        if kind in {I16, I32, I64}:
            return _unzigzag(self._varint())
        if kind in {_DOUBLE, _UUID}:
            return self._bytes(8 if kind == _DOUBLE else 16)
        if kind == BINARY:
            return self._bytes(self._varint())
        if kind in {LIST, _SET}:
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._varint()
            return Items(head & 15, [self._value(head & 15, depth + 1) for _ in range(count)])
        if kind == _MAP:
            count = self._varint()
            kinds = self._byte() if count else 0
            return (
                kinds,
                [(self._value(kinds >> 4, depth + 1), self._value(kinds & 15, depth + 1)) for _ in range(count)],
            )
        if kind == STRUCT:
            return self.struct(depth + 1)
        raise ThriftError(f"it has a value of the unknown kind {kind}")

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _bytes(self, count: int) -> bytes:
        if count > len(self._data) - self._at:
            raise ThriftError("it ends too soon")
        self._at += count
        return self._data[self._at - count : self._at]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ThriftError("a number of it is too long")


def _write(out: bytearray, kind: int, value: Any) -> None:
    if kind in {TRUE, FALSE, _BYTE}:
        out.append(value)
    elif kind in {I16, I32, I64}:
        _write_varint(out, (value << 1) ^ (value >> 63))
    elif kind in {_DOUBLE, _UUID}:
        out += value
    elif kind == BINARY:
        _write_varint(out, len(value))
        out += value
    elif kind in {LIST, _SET}:
        count = len(value.values)
        out.append((min(count, 15) << 4) | value.kind)
        if count >= 15:
            _write_varint(out, count)
        for item in value.values:
            _write(out, value.kind, item)
    elif kind == _MAP:
        kinds, pairs = value
        _write_varint(out, len(pairs))
        out += bytes([kinds]) if pairs else b""
        for key, item in pairs:
            _write(out, kinds >> 4, key)
            _write(out, kinds & 15, item)
    else:
        last = 0
        for field, (inner, item) in sorted(value.items()):
            step = field - last
            out.append((step << 4 if 0 < step < 16 else 0) | inner)
            if not 0 < step < 16:
                _write_varint(out, (field << 1) ^ (field >> 63))
            if inner not in {TRUE, FALSE}:
                _write(out, inner, item)
            last = field
        out.append(_STOP)


def _write_varint(out: bytearray, value: int) -> None:
    while value > 127:
        out.append((value & 127) | 128)
        value >>= 7
    out.append(value)


def _unzigzag(value: int) -> int:
    return (value >> 1) ^ -(value & 1)
