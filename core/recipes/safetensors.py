"""A strict reader of safetensors headers. It reads a window at a time, and bounds the cost of a hostile header before it parses."""

import json
import re
from codecs import getincrementaldecoder
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from nightpress.core.recipes.header import TensorInfo
from nightpress.core.recipes.jsonfile import malformed, parse_json, unique_keys
from nightpress.core.recipes.model_files import ModelFiles

MAX_TENSORS = 100_000

#: Data type → bytes per element. Types of less than a byte are refused.
DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}

_HEADER_BYTES = 100 * 1024**2
_SMALL_HEADER_BYTES = 1024**2
_HEADER_SHARE = 20  #: a header above _SMALL_HEADER_BYTES may take at most 1 / 20 of the file
_WINDOW = 2 * 1024**2
_ENTRY_BYTES = 8 * 1024  #: limit of an entry: the longest name, fully escaped, and its description
_METADATA_BYTES = 1024**2
_MAX_NAME = 512
_MAX_DIMS = 16
_MAX_BYTES = 1 << 62

_MARK = b'"data_offsets"'
_NAME = re.compile(rb'\s*"((?:[^"\\]|\\.)*)"\s*:\s*')
_NEXT = re.compile(rb"\s*([,}])")
_SIZE = rb"(?:0|[1-9]\d{0,18})"
#: An entry as every known writer writes it, with its name before and the comma or bracket after it. Matching it is several times faster than
#: parsing JSON; other entries are parsed. A name with escapes, or that is no ASCII, is no such entry.
_USUAL = re.compile(
    rb'\s*"([ !#-\[\]-~]{1,%d})"\s*:\s*'
    rb'\{"dtype":\s?"(\w{1,20})",\s?"shape":\s?\[((?:%b(?:,\s?%b){0,%d})?)\],\s?"data_offsets":\s?\[(%b),\s?(%b)\]\}'
    rb"\s*([,}])" % (_MAX_NAME, _SIZE, _SIZE, _MAX_DIMS - 1, _SIZE, _SIZE)
)

#: A tensor as its entry describes it: name, dtype, shape, and where its bytes begin and end.
_Entry = tuple[str, str, tuple[int, ...], int, int]


def read_safetensors_header(files: ModelFiles, path: str, size: int) -> list[TensorInfo]:
    """Return the tensors of a file, in the order of their bytes.

    size: of the file, in bytes. Raises NightpressError(malformed_model) for any flaw. The header's entries must describe each byte of the
    file exactly once, without gap or overlap.
    """
    start = files.read(path, 0, 8)
    if len(start) < 8 or size < 10:
        raise malformed(path, "it is too short for a safetensors file")
    length = int.from_bytes(start, "little")
    limit = min(_HEADER_BYTES, max(_SMALL_HEADER_BYTES, size // _HEADER_SHARE))
    if length > limit and (start[:2] == b"PK" or start[:1] == b"\x80"):
        raise malformed(path, "it is a pickle or an archive under another name, and is not opened here")
    if length > limit:
        raise malformed(path, f"its header claims {length} bytes; at most {limit} make sense in this file")
    if 8 + length > size:
        raise malformed(path, f"it is truncated: its header alone has {length} bytes, the file {size}")
    _refuse_too_many(files, path, length)
    header = _Header(files, path, length)
    found: list[tuple[TensorInfo, tuple[int, int]]] = []
    for entry in header.entries():
        found.append((_tensor(path, entry), entry[3:]))
        if len(found) > MAX_TENSORS:
            raise malformed(path, f"it has more than {MAX_TENSORS} tensors")
    names = {tensor.name for tensor, _ in found}
    if len(names) != len(found):
        raise malformed(path, "a tensor stands twice in its header")
    found.sort(key=lambda pair: pair[1])
    _check_layout(path, [span for _, span in found], size - 8 - length)
    return [tensor for tensor, _ in found]


def _refuse_too_many(files: ModelFiles, path: str, length: int) -> None:
    """Count the tensors before parsing, by searching for `"data_offsets"`. This is cheap even for a million tensors."""
    found = 0
    for begin in range(0, length, _WINDOW) if length > MAX_TENSORS * len(_MARK) else ():
        found += files.read(path, 8 + begin, min(_WINDOW, length - begin)).count(_MARK)
        if found > MAX_TENSORS:
            raise malformed(path, f"it has more than {MAX_TENSORS} tensors")


def _tensor(path: str, entry: _Entry) -> TensorInfo:
    name, dtype, shape, begin, end = entry
    total = DTYPE_BYTES.get(dtype)
    if total is None:
        raise _flaw(path, name, f"its dtype {dtype[:20]!r} is not known")
    for dim in shape:
        total *= dim
        if total > _MAX_BYTES:
            raise _flaw(path, name, "its shape needs more bytes than any file has")
    if end - begin != total:
        raise _flaw(path, name, f"its shape and dtype need {total} bytes, its data_offsets span {end - begin}")
    return TensorInfo(name=name, dtype=dtype, shape=shape, size=total)


def _parsed(path: str, name: str, raw: Any) -> _Entry:
    """Return an entry from its JSON. Raises NightpressError(malformed_model) if its fields are not of their types."""
    if not name.isprintable() or not 1 <= len(name) <= _MAX_NAME:
        raise _flaw(path, name, "its name is empty, too long or not printable")
    if not isinstance(raw, dict) or raw.keys() != {"dtype", "shape", "data_offsets"}:
        raise _flaw(path, name, "it is not described by dtype, shape and data_offsets alone")
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str):
        raise _flaw(path, name, f"its dtype {str(dtype)[:20]!r} is not known")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMS:
        raise _flaw(path, name, "its shape is not a short list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise _flaw(path, name, "its data_offsets are not two positions")
    return name, dtype, tuple(shape), offsets[0], offsets[1]


def _are_sizes(raw: Any) -> bool:
    return isinstance(raw, list) and all(type(size) is int and size >= 0 for size in raw)


def _flaw(path: str, name: str, why: str) -> Exception:
    return malformed(path, f"tensor {name[:100]!r}: {why}")


def _check_layout(path: str, spans: list[tuple[int, int]], data: int) -> None:
    for (_, end), (begin, _) in pairwise([(0, 0), *spans]):
        if begin != end:
            raise malformed(
                path, f"its tensors {'overlap' if begin < end else 'leave a gap'} at byte {min(begin, end)}"
            )
    described = spans[-1][1] if spans else 0
    if described > data:
        raise malformed(path, f"it is truncated: its tensors need {described} bytes, {data} are there")
    if described < data:
        raise malformed(path, f"{data - described} bytes at its end belong to no tensor")


class _Header:
    """Iterates over the entries `"name": {…}` of a header of `length` bytes. Only a window of the header is in memory."""

    def __init__(self, files: ModelFiles, path: str, length: int) -> None:
        self._files = files
        self._path = path
        self._rest = length  #: bytes not yet read
        self._offset = 8
        self._window = b""
        self._at = 0

    def entries(self) -> Iterator[_Entry]:
        self._fill(_ENTRY_BYTES)
        if self._window[:1] != b"{":
            raise malformed(self._path, "its header is not a JSON object")
        self._at = 1
        metadata_seen = False
        if self._closed_at_once():
            return
        while True:
            self._fill(_ENTRY_BYTES)
            usual = _USUAL.match(self._window, self._at, self._at + _ENTRY_BYTES)
            if usual is not None and usual[1] != b"__metadata__":
                name, dtype, sizes, begin, end, follows = usual.groups()
                self._at = usual.end()
                shape = tuple(map(int, sizes.split(b","))) if sizes else ()
                yield name.decode(), dtype.decode(), shape, int(begin), int(end)
            else:
                name = self._name()
                if name == "__metadata__":
                    if metadata_seen:
                        raise malformed(self._path, "its __metadata__ stands twice")
                    metadata_seen = True
                    self._metadata()
                else:
                    yield _parsed(self._path, name, self._description())
                self._fill(_ENTRY_BYTES)
                found = _NEXT.match(self._window, self._at)
                if not found:
                    raise malformed(self._path, "its header is not a JSON object of tensors")
                self._at, follows = found.end(), found[1]
            if follows == b"}":
                self._only_padding()
                return

    def _fill(self, wanted: int) -> None:
        """Read until at least `wanted` bytes lie ahead in the window, or the header ends."""
        if len(self._window) - self._at >= wanted or not self._rest:
            return
        piece = self._files.read(self._path, self._offset, min(_WINDOW, self._rest))
        if not piece:
            raise malformed(self._path, "it ends within its header")
        self._offset += len(piece)
        self._rest -= len(piece)
        self._window = self._window[self._at :] + piece
        self._at = 0
        self._fill(wanted)

    def _closed_at_once(self) -> bool:
        found = _NEXT.match(self._window, self._at)
        if found and found[1] == b"}":
            self._at = found.end()
            self._only_padding()
            return True
        return False

    def _name(self) -> str:
        found = _NAME.match(self._window, self._at, self._at + _ENTRY_BYTES)
        if not found:
            raise malformed(self._path, "its header is not a JSON object of tensors")
        self._at = found.end()
        name: str
        if b"\\" not in found[1] and found[1].isascii():
            name = found[1].decode()
        else:
            name = parse_json(self._path, b'"' + found[1] + b'"')
        return name

    def _description(self) -> Any:
        end = self._window.find(b"}", self._at, self._at + _ENTRY_BYTES) + 1
        if not end:
            raise malformed(self._path, "an entry of its header is too long")
        text = self._window[self._at : end]
        if b"\\" in text:  # else an escaped "data_offsets" would not be counted
            raise malformed(self._path, "an entry of its header is written with escapes")
        self._at = end
        return parse_json(self._path, text)

    def _metadata(self) -> None:
        self._fill(_METADATA_BYTES)
        try:
            # An incremental decoder, because the piece may end inside a character.
            text = getincrementaldecoder("utf-8")().decode(self._window[self._at : self._at + _METADATA_BYTES])
            raw, end = json.JSONDecoder(object_pairs_hook=unique_keys).raw_decode(text)
        except (ValueError, RecursionError) as error:
            raise malformed(self._path, f"its __metadata__ is damaged or over {_METADATA_BYTES} bytes") from error
        if not isinstance(raw, dict) or not all(isinstance(value, str) for value in raw.values()):
            raise malformed(self._path, "its __metadata__ is not a mapping of texts")
        self._at += len(text[:end].encode())

    def _only_padding(self) -> None:
        while True:
            if self._window[self._at :].strip(b" "):
                raise malformed(self._path, "something follows the end of its header")
            self._at = len(self._window)
            if not self._rest:
                return
            self._fill(1)
