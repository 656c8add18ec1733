"""Reads untrusted YAML by the core schema of YAML 1.2: mappings, lists, strings, numbers, booleans and null.

Aliases, merge keys and tags are refused: with them, 500 bytes can expand to gigabytes. Size, depth and number of values are bounded, and
checked before values are built.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

import yaml

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.jsonfile import is_text

MAX_CHARACTERS = 64 * 1024
MAX_DEPTH = 32
MAX_NODES = 20_000
_MAX_DIGITS = 64  #: digits of a number; Python's time to parse them grows with their square
_MERGE = "<<"

_NULL = re.compile(r"~|null|Null|NULL|")
_TRUE = re.compile(r"true|True|TRUE")
_FALSE = re.compile(r"false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+")
_HEX = re.compile(r"0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")

#: libyaml's scanner is many times faster; not every build of PyYAML has it.
_Loader: Any = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader


def read_yaml(text: str, *, max_characters: int = MAX_CHARACTERS, max_nodes: int = MAX_NODES) -> Any:
    """Read a text with a single document. Raises NightpressError(invalid_recipe) that names the faulty line."""
    if len(text) > max_characters:
        raise _refused(f"it has {len(text)} characters; at most {max_characters} are read", "Shorten it.")
    if not is_text(text):
        raise _refused("it has characters that are no text", "Save it as UTF-8.")
    try:
        return _Builder(yaml.parse(text, Loader=_Loader), max_nodes).document()
    except yaml.YAMLError as error:
        raise _refused(str(error)[:500], "Check its indentation and quotes.") from error
    except (ValueError, OverflowError, RecursionError) as error:  # e.g. escapes of code points that do not exist
        raise _refused(str(error)[:200], "Check its numbers and escapes.") from error


class _Builder:
    """Builds values from the parser's events, and counts the values."""

    def __init__(self, events: Iterator[Any], max_nodes: int) -> None:
        self._events = events
        self._left = self._max_nodes = max_nodes

    def document(self) -> Any:
        next(self._events)  # start of the stream
        if isinstance(next(self._events), yaml.StreamEndEvent):
            return None
        value = self._value(next(self._events), 0)
        next(self._events)  # end of the document
        if not isinstance(next(self._events), yaml.StreamEndEvent):
            raise _refused("it holds more than one document", "Keep one recipe a file.")
        return value

    def _value(self, event: Any, depth: int) -> Any:
        self._check(event, depth)
        if isinstance(event, yaml.ScalarEvent):
            return _scalar(event) if event.implicit[0] else _checked(event)
        if isinstance(event, yaml.SequenceStartEvent):
            items = []
            while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
                items.append(self._value(event, depth + 1))
            return items
        found: dict[str, Any] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            key = self._key(event, depth + 1)
            if key in found:
                raise _refused(f"{_place(event)}: {key[:100]!r} stands twice", "Keep one of them.")
            found[key] = self._value(next(self._events), depth + 1)
        return found

    def _key(self, event: Any, depth: int) -> str:
        self._check(event, depth)
        if not isinstance(event, yaml.ScalarEvent):
            raise _refused(f"{_place(event)}: a key is not a text", "Use names as keys.")
        if event.value == _MERGE and event.implicit[0]:
            raise _refused(f"{_place(event)}: merge keys (`<<`) are not read here", "Write the fields out.")
        return _checked(event)

    def _check(self, event: Any, depth: int) -> None:
        self._left -= 1
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise _refused(f"{_place(event)}: anchors and aliases are not read here", "Write the values out.")
        if event.tag is not None:
            raise _refused(f"{_place(event)}: tags are not read here", f"Leave out {str(event.tag)[:60]}.")
        if depth > MAX_DEPTH:
            raise _refused(f"{_place(event)}: it nests deeper than {MAX_DEPTH} levels", "No recipe needs that.")
        if self._left < 0:
            raise _refused(f"{_place(event)}: it has more than {self._max_nodes} values", "No recipe needs that.")


def _checked(event: Any) -> str:
    text: str = event.value
    if not is_text(text):
        raise _refused(f"{_place(event)}: it has characters that are no text", "Leave out that escape.")
    return text


def _scalar(event: Any) -> Any:
    """Return a plain scalar's value, resolved by the core schema."""
    text = _checked(event)
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text) or _FALSE.fullmatch(text):
        return text[0] in "tT"
    if len(text) > _MAX_DIGITS and (_INT.fullmatch(text) or _HEX.fullmatch(text) or _FLOAT.fullmatch(text)):
        raise _refused(f"{_place(event)}: a number has more than {_MAX_DIGITS} digits", "Write it in quotes.")
    if _INT.fullmatch(text):
        return int(text)
    if _HEX.fullmatch(text):
        return int(text, 0)
    if _NOT_FINITE.fullmatch(text) or (_FLOAT.fullmatch(text) and not math.isfinite(float(text))):
        raise _refused(f"{_place(event)}: {text} is not a finite number", "Leave it out.")
    return float(text) if _FLOAT.fullmatch(text) else text


def _place(event: Any) -> str:
    return f"line {event.start_mark.line + 1}"


def _refused(why: str, hint: str) -> NightpressError:
    return NightpressError(ErrorCode.INVALID_RECIPE, f"The recipe is not valid YAML: {why}.", hint=hint)
