"""The errors of destinations."""

from nightpress.core.errors import ErrorCode, NightpressError


def unavailable(where: str, why: str) -> NightpressError:
    return NightpressError(
        ErrorCode.DESTINATION_UNAVAILABLE,
        f"{where} did not take the result: {why}.",
        hint="It is tried again by itself. If that goes on, is the address right, and the place in service?",
    )


def refused(where: str, why: str, *, hint: str = "") -> NightpressError:
    return NightpressError(
        ErrorCode.DESTINATION_REFUSED,
        f"{where} refuses the result: {why}.",
        hint=hint
        or "Do the stored credentials allow writing there? `nightpress credentials rotate` replaces them; then `nightpress deliveries retry`.",
    )
