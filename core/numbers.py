"""Whole numbers that strangers wrote as text."""


def whole_number(raw: str, *, digits: int = 15) -> int | None:
    """The number that plain ASCII digits write; None for anything else.

    `str.isdigit` alone takes `²`, which `int` refuses, and `int` takes time that grows with the square of the digits.
    """
    return int(raw) if raw.isascii() and raw.isdigit() and len(raw) <= digits else None
