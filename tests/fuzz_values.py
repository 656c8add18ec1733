"""Values that often cause errors in programs, and functions that corrupt valid values."""

import json
from random import Random
from typing import Any

TEXTS = (
    "", " ", "\0", "²", "٣", "१२", "Ⅷ", "½", "-", "+5", "1e9", "1e999", "0x10", "1_000", "9" * 30, "9" * 5000, "-1", "NaN", "inf",
    "true", "null", "None", "\ud800", "a\udfffb", "\ufeff", "\u202e", "\u2028", "\x1b[31m", "\r\n", "a\r\nSet-Cookie: x", "é" * 100,
    "🙂", "x" * 300, "../../etc/passwd", "/", "\\", "%00", "%ff", "%s%n", "{{7*7}}", "${x}", "'; --", '"', "<script>", "*", "@", "@@",
    "2026-13-45", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-12:00", "2026-01-01T00:00:00Z", "24:00", "builtin:prose",
    "* * * * *", "0 0 30 2 *", "² * * * *", "*/0 * * * *", "1-0 * * * *", "0 2 * * MON#9", "Europe/Berlin", "../../etc/localtime",
    "http://[::1", "https://a:99999/", "https://\u2488com/", "https://xn--/", "s3://", "hf://a", "int8-encoder", "default", "<= ²%", "²:4",
    '"v²"', "bytes=²-", "wait=²", "Bearer ", "[" * 2000, "{" * 2000, "e" + "\u0301" * 500,
)  # fmt: skip
NUMBERS = (
    0,
    -1,
    1,
    2**31,
    2**53,
    2**63,
    2**64,
    10**30,
    -(10**30),
    0.5,
    -0.0,
    1e308,
    float("inf"),
    float("nan"),
    10**4000,
)


def any_text(dice: Random) -> str:
    if dice.random() < 0.7:
        return dice.choice(TEXTS)
    return "".join(
        chr(dice.choice((dice.randrange(128), dice.randrange(0x3000), dice.randrange(0x110000)))) for _ in range(8)
    )


def any_value(dice: Random, depth: int = 0) -> Any:
    kind = dice.randrange(8 if depth < 3 else 5)
    if kind < 2:
        return any_text(dice)
    if kind == 2:
        return dice.choice(NUMBERS)
    if kind == 3:
        return dice.choice((None, True, False))
    if kind == 4:
        return dice.choice(([], {}, [[]], [None], "x", 1))
    if kind == 5:
        return [any_value(dice, depth + 1) for _ in range(dice.randrange(4))]
    if kind == 6:
        return {any_text(dice): any_value(dice, depth + 1) for _ in range(dice.randrange(4))}
    return _nested(dice)


def spoiled(dice: Random, value: Any) -> Any:
    """A copy of a JSON value with one part replaced, removed or added."""
    if isinstance(value, dict) and value and dice.random() < 0.85:
        key = dice.choice(list(value))
        found = dict(value)
        match dice.randrange(8):
            case 0:
                del found[key]
            case 1:
                found[any_text(dice)] = any_value(dice)
            case 2 | 3:
                found[key] = any_value(dice)
            case _:
                found[key] = spoiled(dice, value[key])
        return found
    if isinstance(value, list) and value and dice.random() < 0.85:
        at = dice.randrange(len(value))
        return [*value[:at], spoiled(dice, value[at]), *value[at + 1 :]]
    return any_value(dice)


def as_json(value: Any) -> bytes:
    """The value as non-strict JSON, with NaN and unpaired surrogates."""
    try:
        return json.dumps(value).encode()
    except ValueError:  # Python refuses to print integers of too many digits
        return b'{"n": ' + b"9" * 5000 + b"}"


def mangled(dice: Random, data: bytes) -> bytes:
    """A copy with some bytes changed, removed, repeated or inserted."""
    found = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 8))):
        at = dice.randrange(len(found) + 1)
        match dice.randrange(6):
            case 0:
                found[at : at + 1] = bytes([dice.randrange(256)])
            case 1:
                del found[at : at + dice.choice((1, 4, 100))]
            case 2:
                found[at:at] = as_json(any_value(dice))[:2000]
            case 3:
                found[at:at] = found[at : at + dice.choice((1, 10, 1000))] * dice.choice((2, 50))
            case 4:
                found[at:at] = dice.choice(
                    (b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r", b"\xe2\x80\xa8", b'"', b"\n\n")
                )
            case _:
                del found[at:]
    return bytes(found)


def _nested(dice: Random) -> Any:
    value: Any = 1
    for _ in range(dice.choice((20, 70, 300))):
        value = [value] if dice.random() < 0.5 else {"a": value}
    return value
