"""Idempotency-Key on every POST: a request that is repeated with its key is executed once, and gets the same answer again."""

import hashlib
import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from nightpress.api.deps import Services, authenticated
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.service.access.idempotency import Answered

HEADER = "Idempotency-Key"
REPLAYED = "Idempotency-Replayed"
PATTERN = r"^[\x21-\x7e]+$"
MAX_LENGTH = 255
_KEPT_HEADERS = ("location", "etag", "content-type", "cache-control")
#: This route stores its key in the transaction that stores the job, which is safer than storing the answer afterwards.
_STORES_ITS_KEY = "/v1/jobs"

PARAMETER = {
    "name": HEADER,
    "in": "header",
    "required": False,
    "description": "Makes the request safe to repeat for a day: the same key and body get the same answer.",
    "schema": {"type": "string", "minLength": 1, "maxLength": MAX_LENGTH, "pattern": PATTERN},
}

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class OnceRoute(APIRoute):
    """The route class of every router that has a POST."""

    def get_route_handler(self) -> Handler:
        handle = super().get_route_handler()
        if "POST" not in (self.methods or ()) or self.path == _STORES_ITS_KEY:
            return handle

        async def once(request: Request) -> Response:
            key = key_of(request)
            return await handle(request) if key is None else await _once(request, key, handle)

        return once


def key_of(request: Request) -> str | None:
    """The Idempotency-Key of a request; None without one. Raises NightpressError(invalid_request) for an invalid key."""
    key = request.headers.get(HEADER)
    if key is not None and (len(key) > MAX_LENGTH or not re.fullmatch(PATTERN, key)):
        raise NightpressError(
            ErrorCode.INVALID_REQUEST,
            f"The {HEADER} is not 1 to {MAX_LENGTH} visible ASCII characters.",
            hint="Use e.g. a UUID.",
        )
    return key


async def _once(request: Request, key: str, handle: Handler) -> Response:
    caller = await authenticated(request)
    services: Services = request.app.state.services
    # The API key is part of the request: a key with fewer rights must not get the answer that another key got.
    content = (
        f"{caller.key_id} {request.method} {request.url.path}?{request.url.query}\n".encode() + await request.body()
    )
    begun = await services.call(
        services.resources.idempotency.begin, caller.tenant_id, key, hashlib.sha256(content).hexdigest()
    )
    if isinstance(begun, Answered):
        request.scope["state"]["replayed"] = True
        return _answer_again(begun)
    try:
        response = await handle(request)
    except Exception:
        await services.call(services.resources.idempotency.forget, begun)
        raise
    if response.status_code >= 400:
        await services.call(services.resources.idempotency.forget, begun)
        return response
    headers = {name: response.headers[name] for name in _KEPT_HEADERS if name in response.headers}
    body = None if "no-store" in headers.get("cache-control", "") else bytes(response.body)
    await services.call(services.resources.idempotency.answer, begun, Answered(response.status_code, headers, body))
    return response


def _answer_again(answered: Answered) -> Response:
    if answered.body is None:
        raise NightpressError(
            ErrorCode.CONFLICT,
            "This request was done. Its answer holds a secret, which is shown once and not stored.",
            hint="If the answer was lost, rotate or delete what the request made, and send the request with a new key.",
            location=answered.headers.get("location", ""),
        )
    return Response(answered.body, status_code=answered.status, headers={**answered.headers, REPLAYED: "true"})
