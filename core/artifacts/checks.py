"""What every store checks of keys and bytes, and the errors that it raises."""

from collections.abc import Iterable, Iterator

from nightpress.core.errors import ErrorCode, NightpressError

MAX_KEY_BYTES = 1024


def valid_key(key: str) -> str:
    """Return the key. Raises NightpressError(invalid_request) for anything that isn't a plain relative path."""
    parts = key.split("/")
    if (
        not key.isprintable()
        or "\\" in key
        or len(key.encode(errors="replace")) > MAX_KEY_BYTES
        or any(part in {"", ".", ".."} or part.startswith(".np-") for part in parts)
    ):
        raise NightpressError(
            ErrorCode.INVALID_REQUEST,
            f"{key[:200]!r} can't be the name of a file here.",
            hint="Use a plain relative path.",
        )
    return key


def missing_object(key: str) -> NightpressError:
    return NightpressError(
        ErrorCode.NOT_FOUND,
        f"The object {key} is not in the store.",
        hint="It was deleted, or never finished.",
        key=key,
    )


def wrong_checksum(key: str, expected: str, found: str) -> NightpressError:
    return NightpressError(
        ErrorCode.CHECKSUM_MISMATCH,
        f"{key} has other bytes than announced: SHA-256 {found[:12]}… instead of {expected[:12]}….",
        hint="Nothing of it was kept. Transfer the file again; if it happens twice, the source changed or its disk is failing.",
        key=key,
        expected=expected,
        found=found,
    )


def exactly(key: str, pieces: Iterable[bytes], size: int) -> Iterator[bytes]:
    """Yield the pieces, which must have exactly `size` bytes in total.

    Raises payload_too_large before it yields a byte too many, and invalid_request at the end if bytes are missing.
    """
    received = 0
    for piece in pieces:
        received += len(piece)
        if received > size:
            raise NightpressError(
                ErrorCode.PAYLOAD_TOO_LARGE,
                f"{key} is larger than the {size} bytes announced for it.",
                hint="Send exactly the announced bytes: a part's `size` from its `offset`.",
                key=key,
            )
        yield piece
    if received < size:
        raise NightpressError(
            ErrorCode.INVALID_REQUEST,
            f"{key} ended after {received} of {size} bytes.",
            hint="Nothing of it was kept. Send it again, whole.",
            key=key,
        )
