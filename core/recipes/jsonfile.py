"""Reads untrusted JSON. Refuses duplicate keys, NaN and infinity, deep nesting, and strings that a database can't store."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Any, NoReturn

from nightpress.core.errors import ErrorCode, NightpressError

_MAX_DEPTH = 64
_MANY_BYTES = 4 * 1024**2  #: limit of JSON that is not ASCII: Python takes up to four bytes for each of its characters


@dataclass
class JsonBudget:
    """The bytes and values of a model that may still be parsed.

    Counted before parsing: an empty list takes 3 bytes of a file and 64 bytes of memory.
    """

    size: int = 64 * 1024**2
    values: int = 500_000

    def take(self, path: str, data: bytes) -> None:
        """Subtract a file from the budget. Raises NightpressError(malformed_model) if the budget is used up."""
        self.size -= len(data)
        # This also counts commas and brackets inside strings. The bound is far above any model's count.
        self.values -= data.count(b",") + data.count(b"[") + data.count(b"{")
        if self.size < 0 or self.values < 0:
            raise malformed(path, "the model's JSON files together hold more than any model needs")
        if len(data) > _MANY_BYTES and not data.isascii():
            raise malformed(path, f"it has {len(data)} bytes, and is not ASCII: at most {_MANY_BYTES} are read of such")


def malformed(path: str, why: str) -> NightpressError:
    return NightpressError(
        ErrorCode.MALFORMED_MODEL,
        f"{path}: {why}.",
        hint="Fetch or save the model again, and compare checksums with its source.",
        file=path,
    )


def parse_json(path: str, data: bytes) -> Any:
    """Parse a file. Raises NightpressError(malformed_model) for anything but plain JSON in UTF-8."""
    try:
        return _DECODER.decode(data.decode())
    except (ValueError, RecursionError) as error:
        raise malformed(path, f"it is not plain JSON: {str(error)[:200] or 'nested too deep'}") from error


def walk(path: str, root: Any) -> Iterator[tuple[str, Any]]:
    """Yield (key, value) at every depth; elements of a list have the list's key.

    Raises NightpressError(malformed_model) for a value that a database can't store, and for nesting deeper than `_MAX_DEPTH`.
    """
    stack: list[Iterator[tuple[str, Any]]] = [iter([("", root)])]
    while stack:
        found = next(stack[-1], None)
        if found is None:
            stack.pop()
            continue
        key, value = found
        if isinstance(value, float) and not math.isfinite(value):
            raise malformed(path, f"`{key[:100]}` is not a finite number")
        if isinstance(value, str) and not is_text(value):
            raise malformed(path, f"`{key[:100]}` has characters that are no text")
        yield key, value
        if isinstance(value, dict):
            if not all(map(is_text, value)):
                raise malformed(path, f"a key below `{key[:100]}` has characters that are no text")
            stack.append(iter(value.items()))
        elif isinstance(value, list):
            stack.append(zip(repeat(key), value, strict=False))
        if len(stack) > _MAX_DEPTH:
            raise malformed(path, f"it nests deeper than {_MAX_DEPTH} levels")


def is_text(value: str) -> bool:
    """Return whether a database can store the string: PostgreSQL refuses NUL, and UTF-8 can't encode lone surrogates."""
    if "\0" in value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` that raises ValueError for a duplicate key."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys, parse_constant=_refuse)
