"""Optimistic locking: an edit or deletion names the version that it is based on, and fails if another edit came first."""

from nightpress.core.errors import ErrorCode, NightpressError


def changed_since() -> NightpressError:
    """The error for a write that is based on an outdated version."""
    return NightpressError(
        ErrorCode.PRECONDITION_FAILED,
        "It was changed since it was read.",
        hint="Read it again, and send the new ETag as If-Match.",
    )
