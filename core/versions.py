"""What people edit carries a version, so that nobody's change is written over, or deleted, by somebody who hasn't seen it."""

from nightpress.core.errors import ErrorCode, NightpressError


def changed_since() -> NightpressError:
    """For a write that named a version which is no longer the thing's own."""
    return NightpressError(
        ErrorCode.PRECONDITION_FAILED,
        "It was changed since it was read.",
        hint="Read it again, and send the new ETag as If-Match.",
    )
