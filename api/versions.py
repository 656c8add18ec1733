"""Optimistic locking over HTTP: the version is the ETag, and an edit names the version that it is based on in If-Match."""

import re
from typing import Annotated

from fastapi import Header
from starlette.responses import Response

from nightpress.api.routes import answer
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.wire.access import TenantView
from nightpress.core.wire.deliveries import CredentialView, ModelDestinationsView
from nightpress.core.wire.schedules import ScheduleView
from nightpress.core.wire.webhooks import WebhookView

Versioned = CredentialView | ModelDestinationsView | ScheduleView | TenantView | WebhookView
IfMatch = Annotated[
    str | None,
    Header(
        max_length=64,
        description="The ETag of the version that the edit is based on: 412 where there is a newer version.",
    ),
]


def answer_version(view: Versioned, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A response with a resource, and its version as the ETag."""
    return answer(view, status=status, headers={"ETag": f'"v{view.version}"', **(headers or {})})


def version_of(if_match: str | None) -> int | None:
    """The version that If-Match names; None for any version. To be asked after the body was found valid. Raises NightpressError(precondition_failed) for another ETag."""
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
