"""Decodes the text of users' data sets in pieces: gzip, UTF-8, the line ends of every system. Each step is bounded."""

import codecs
import io
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from nightpress.core.errors import ErrorCode, NightpressError

READ_BYTES = 64 * 1024**2  #: unpacked bytes of a data set that are read; a quality figure needs far less
READ_LINES = 1_000_000  #: lines that are read, blank lines included; for prose, paragraphs
MAX_LINE = 1024**2  #: characters of a row; a longer row is refused, and a longer paragraph is split
_PIECE = 64 * 1024
_MAX_MEMBERS = 10_000  #: members of a gzip file
_MOST_UNPACKED = 200  #: largest unpacked size, in multiples of the packed size; text rarely reaches 20
_RATIO_FROM = 8 * 1024**2  #: unpacked bytes up to which the ratio is not checked


@dataclass
class Window:
    """How much of a file is read, and which limit ended the reading."""

    size: int = READ_BYTES
    lines: int = READ_LINES
    cut: Literal["size", "lines"] | None = None

    @property
    def hides(self) -> bool:
        """Whether a job would read more of the file."""
        limit, most = (self.size, READ_BYTES) if self.cut == "size" else (self.lines, READ_LINES)
        return self.cut is not None and limit < most


def invalid(ref: str, what: str, hint: str) -> NightpressError:
    return NightpressError(ErrorCode.INVALID_DATA, f"The data set {ref} can't be used: {what}.", hint=hint, data=ref)


def split(texts: Iterator[str], separator: str, window: Window) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, part).

    A paragraph longer than MAX_LINE comes in pieces. A longer line comes as it is, for the caller to refuse.
    """
    number, rest = 0, ""
    for text in texts:
        *whole, rest = (rest + text).split(separator)
        for part in whole:
            if number == window.lines:
                window.cut = "lines"
                return
            number += 1
            yield number, part
        if len(rest) > MAX_LINE + len(separator):
            if separator == "\n":  # the reader of rows refuses it
                yield number + 1, rest
            else:
                yield number + 1, rest[:MAX_LINE]
                rest = rest[MAX_LINE:]
    if rest and not window.cut:
        yield number + 1, rest


def decoded(ref: str, pieces: Iterable[bytes], window: Window) -> Iterator[str]:
    """Decode UTF-8 with `\\n` as the end of every line, up to the window's size."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    left, at = window.size, 0
    for piece, final in _bounded(pieces):
        if len(piece) > left:
            window.cut, piece, final = "size", piece[:left], False
        left -= len(piece)
        try:
            text: str = decoder.decode(piece, final)
        except UnicodeDecodeError as error:
            if b"\0" in error.object[: error.start]:
                raise _binary(ref, at) from error
            raise invalid(
                ref,
                f"it is not UTF-8 near byte {at} ({error.reason})",
                "Save the file as UTF-8, without any other mark.",
            ) from error
        at += len(piece)
        if "\0" in text:
            raise _binary(ref, at)
        yield text
        if window.cut:
            return


def _binary(ref: str, at: int) -> NightpressError:
    return invalid(ref, f"it has a NUL character near byte {at}", "Bring text, not a binary file.")


def _bounded(pieces: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Yield (piece, whether it is the last): pieces of at most `_PIECE` bytes, then an empty last piece."""
    for piece in pieces:
        for begin in range(0, len(piece), _PIECE):
            yield piece[begin : begin + _PIECE], False
    yield b"", True


def unpacked(ref: str, pieces: Iterable[bytes]) -> Iterator[bytes]:
    packed = size = members = 0
    member = None
    try:
        for piece, _ in _bounded(pieces):
            packed += len(piece)
            rest = piece
            while rest:
                if member is None:
                    rest = rest.lstrip(b"\0") if members else rest  # zero padding after a member, as on tapes
                    if not rest:
                        break
                    member, members = zlib.decompressobj(wbits=31), members + 1
                out = member.decompress(rest, _PIECE)
                while out:
                    size += len(out)
                    _check_ratio(ref, packed, size)
                    yield out
                    out = member.decompress(member.unconsumed_tail, _PIECE) if not member.eof else b""
                rest = member.unused_data if member.eof else b""
                member = None if member.eof else member
                if members > _MAX_MEMBERS:
                    raise invalid(ref, f"its gzip file has more than {_MAX_MEMBERS} members", "Pack it as one.")
            if packed > size + _RATIO_FROM:
                raise invalid(ref, "its gzip file is larger than what it holds", "Pack it again.")
    except zlib.error as error:
        raise invalid(ref, f"it is not a whole gzip file ({error})", "Pack it again and compare checksums.") from error
    if member is not None:
        raise invalid(ref, "it is not a whole gzip file (it ends too soon)", "Pack it again and compare checksums.")


def _check_ratio(ref: str, packed: int, unpacked: int) -> None:
    if unpacked > _RATIO_FROM and unpacked > _MOST_UNPACKED * packed:
        raise NightpressError(
            ErrorCode.PAYLOAD_TOO_LARGE,
            f"The data set {ref} unpacks to more than {_MOST_UNPACKED} times its size; text does not.",
            hint="Bring text that does not repeat itself so often, or bring it unpacked.",
            data=ref,
        )
