"""Reads the label of a row: a class's number or name, a number to be predicted, or the labels of several classes. And a row's slice."""

import math
import re

_MAX_NUMBER = 99_999
_MAX_NAME = 200
_MOST = 1000  #: labels of a row
_LONGEST_SLICE = 64
_FLOAT = re.compile(r"[+-]?\d{1,15}\.\d{1,20}")  #: a number with a decimal point, as CSV has it

Label = int | str | float | tuple[int | str | float, ...]


class LabelError(ValueError):
    """Why a value is no label, as the end of a sentence that begins with the label; and what to do."""

    def __init__(self, why: str, hint: str) -> None:
        super().__init__(why)
        self.hint = hint


def label_of(raw: object) -> Label | None:
    """Return a row's label; None: the row has none. A list becomes a tuple, and a whole number from 0 an int. Raises LabelError."""
    if not isinstance(raw, list):
        return _single(raw)
    found = tuple(label for label in map(_single, raw[: _MOST + 1]) if label is not None)
    if len(found) > _MOST or len(found) < len(raw):
        raise LabelError(f"is a list of more than {_MOST} labels, or has blanks", "List the names of a row's classes.")
    return found


def _single(raw: object) -> int | str | float | None:
    if isinstance(raw, bool):
        return int(raw)
    if isinstance(raw, str):
        raw = raw.strip() or None
    if isinstance(raw, str):
        if not (raw.isascii() and (raw.isdigit() or _FLOAT.fullmatch(raw))):
            if len(raw) > _MAX_NAME:
                raise LabelError(f"is a text of {len(raw)} characters", "Name the class shortly.")
            return raw
        raw = float(raw) if "." in raw else int(raw) if len(raw) <= len(str(_MAX_NUMBER)) else _MAX_NUMBER + 1
    if raw is None:
        return None
    if not isinstance(raw, int | float) or not math.isfinite(raw) or abs(raw) > _MAX_NUMBER:
        raise LabelError(
            f"is neither a class's name nor a number up to {_MAX_NUMBER}, nor a list of these",
            "Write the class's index or its name, as the model's `label2id` has it.",
        )
    return int(raw) if raw >= 0 and int(raw) == raw else float(raw)


def slice_of(raw: object) -> str | None:
    """Return the name of the slice that a row's value stands for. None: the row belongs to none.

    Raises LabelError for a value that is neither a short text nor a whole number.
    """
    if raw is None or (isinstance(raw, str) and not raw.strip()):
        return None
    name = str(raw).strip() if isinstance(raw, int | str) and not isinstance(raw, bool) else ""
    if not name or len(name) > _LONGEST_SLICE or not name.isprintable() or not {"[", "]"}.isdisjoint(name):
        raise LabelError(
            f"is not a name of at most {_LONGEST_SLICE} characters without brackets",
            'Write a short name such as "code", or leave the row without one.',
        )
    return name
