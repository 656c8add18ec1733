"""JSON that strangers wrote: no key twice, no number that JSON lacks, no depth or string that a database chokes on."""

import json
import math
from collections.abc import Iterator
from typing import Any, NoReturn

from core.errors import ErrorCode, NightpressError

_MAX_DEPTH = 64


def malformed(path: str, why: str) -> NightpressError:
    return NightpressError(
        ErrorCode.MALFORMED_MODEL,
        f"{path}: {why}.",
        hint="Fetch or save the model again, and compare checksums with its source.",
        file=path,
    )


def parse_json(path: str, data: bytes) -> Any:
    """Raises NightpressError(malformed_model) for anything but plain JSON in UTF-8."""
    try:
        return json.loads(data.decode(), object_pairs_hook=unique_keys, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise malformed(path, f"it is not plain JSON: {str(error)[:200] or 'nested too deep'}") from error


def walk(path: str, value: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Each value with the key it stands under, at every depth. Raises malformed_model for what can't be kept in a database."""
    if depth > _MAX_DEPTH:
        raise malformed(path, f"it nests deeper than {_MAX_DEPTH} levels")
    if isinstance(value, float) and not math.isfinite(value):
        raise malformed(path, f"`{key[:100]}` is not a finite number")
    if isinstance(value, str) and ("\0" in value or any("\ud800" <= char <= "\udfff" for char in value)):
        raise malformed(path, f"`{key[:100]}` has characters that are no text")
    yield key, value
    if isinstance(value, dict):
        for name, one in value.items():
            yield from walk(path, name, key, depth + 1)
            yield from walk(path, one, name, depth + 1)
    elif isinstance(value, list):
        for one in value:
            yield from walk(path, one, key, depth + 1)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` that takes no key twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")
