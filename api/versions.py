"""ETag and If-Match: the version of a thing as HTTP says it."""

import re
from typing import Annotated

from fastapi import Header

from nightpress.core.errors import ErrorCode, NightpressError

IfMatch = Annotated[
    str | None, Header(max_length=64, description="The ETag that was read: 412 where somebody changed it since.")
]


def etag_of(version: int) -> str:
    return f'"v{version}"'


def version_of(if_match: str | None) -> int | None:
    """The version that an ETag of ours names. None: any will do."""
    if if_match is None or if_match.strip() == "*":
        return None
    found = re.fullmatch(r'"v(\d{1,9})"', if_match.strip())
    if found is None:
        raise NightpressError(
            ErrorCode.PRECONDITION_FAILED,
            "If-Match is not an ETag of this thing.",
            hint="Send the ETag as it was read.",
        )
    return int(found[1])
