"""Parses whole numbers from untrusted text."""


def whole_number(raw: str, *, digits: int = 15) -> int | None:
    """The number that `raw` writes in at most `digits` ASCII digits; None for anything else.

    `str.isdigit` alone accepts `²`, on which `int` raises. The length is limited because the time of `int` grows with the square of
    the number of digits.
    """
    return int(raw) if raw.isascii() and raw.isdigit() and len(raw) <= digits else None
