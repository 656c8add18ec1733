"""Optimistic locking over HTTP: the version is the ETag, and an edit names the version that it is based on in If-Match."""

import re
from typing import Annotated

from fastapi import Header

from nightpress.core.errors import ErrorCode, NightpressError

IfMatch = Annotated[
    str | None,
    Header(
        max_length=64,
        description="The ETag of the version that the edit is based on: 412 where there is a newer version.",
    ),
]


def etag_of(version: int) -> str:
    """The ETag of a version."""
    return f'"v{version}"'


def version_of(if_match: str | None) -> int | None:
    """The version that If-Match names; None for any version. Raises NightpressError(precondition_failed) for another ETag."""
    if if_match is None or if_match.strip() == "*":
        return None
    found = re.fullmatch(r'"v(\d{1,9})"', if_match.strip())
    if found is None:
        raise NightpressError(
            ErrorCode.PRECONDITION_FAILED,
            "If-Match is not an ETag of this resource.",
            hint="Send the ETag as you received it.",
        )
    return int(found[1])
