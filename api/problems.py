"""Every error the API answers with: RFC 9457 `application/problem+json`, with a code from the closed set in core/errors.py."""

import json
import logging
from collections.abc import Iterable, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match, Route

from nightpress.core.errors import ERROR_KINDS, ErrorCode, NightpressError
from nightpress.core.wire.base import Problem

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = 5  #: what a client that got 429 or 503 is asked to wait
_MAX_FAULTS = 50

#: Statuses that the framework decides itself. 405 and 415 have no code of their own: the request was not valid.
_FRAMEWORK_CODES = {
    401: ErrorCode.UNAUTHENTICATED,
    403: ErrorCode.FORBIDDEN,
    404: ErrorCode.NOT_FOUND,
    413: ErrorCode.PAYLOAD_TOO_LARGE,
    429: ErrorCode.RATE_LIMITED,
}
_FRAMEWORK_DETAILS = {
    404: ("There is nothing at this address.", "See /docs for the addresses there are."),
    405: ("This address doesn't take this method.", "The Allow header names those it takes."),
}


def problem(
    error: NightpressError,
    request: Request,
    *,
    status: int | None = None,
    headers: dict[str, str] | None = None,
    faults: list[dict[str, Any]] | None = None,
) -> Response:
    """Answer with an error. `status` overrides the code's own, for 405 and the like."""
    return Response(
        json.dumps(problem_body(error, request.scope, status=status, faults=faults)),
        status_code=status or error.kind.status,
        headers=problem_headers(error, status) | (headers or {}),
        media_type=MEDIA_TYPE,
    )


def problem_body(
    error: NightpressError, scope: Any, *, status: int | None = None, faults: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """The members of one problem. Facts that came with the error stand beside the standard members, as RFC 9457 §3.2 has it."""
    body = Problem(
        type=f"urn:nightpress:error:{error.code.value}",
        title=error.kind.title,
        status=status or error.kind.status,
        detail=error.message,
        code=error.code.value,
        hint=error.hint,
        instance=scope.get("path", ""),
        request_id=scope.get("state", {}).get("request_id", ""),
        errors=faults if faults is not None else error.details.get("faults", []),
    ).model_dump(mode="json")
    extra = {key: value for key, value in error.details.items() if key not in body and key != "faults"}
    return {**json.loads(json.dumps(extra, default=str)), **body}


def problem_headers(error: NightpressError, status: int | None = None) -> dict[str, str]:
    number = status or error.kind.status
    if number in {429, 503} or "retry_after_s" in error.details:
        return {"Retry-After": str(error.details.get("retry_after_s", RETRY_AFTER_S))}
    if number == 401:
        return {"WWW-Authenticate": 'Bearer realm="nightpress"'}
    return {}


async def _on_nightpress_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, NightpressError)
    if error.kind.status >= 500:
        log.warning("%s %s: %s: %s", request.method, request.url.path, error.code.value, error.message)
    return problem(error, request)


async def _on_invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    # The input itself is not echoed: it may be large, and it may hold what should not be in a log.
    faults = [
        {"at": ".".join(str(part) for part in one["loc"]), "problem": one["msg"], "type": one["type"]}
        for one in error.errors()[:_MAX_FAULTS]
    ]
    first = faults[0]
    return problem(
        NightpressError(
            ErrorCode.INVALID_REQUEST,
            f"{first['at']}: {first['problem']}.",
            hint="Correct the fields listed in `errors`; /docs shows an example of every request.",
        ),
        request,
        faults=faults,
    )


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status, headers = error.status_code, dict(error.headers or {})
    if status == 400:
        status = 422  # a body that is no JSON: as every other request that isn't valid
    if status == 405:
        headers["Allow"] = ", ".join(_methods_of(request))
    code = _FRAMEWORK_CODES.get(status)
    if code is None:
        code = ErrorCode.INVALID_REQUEST if status < 500 else ErrorCode.INTERNAL
    detail, hint = _FRAMEWORK_DETAILS.get(status, (str(error.detail), ""))
    return problem(NightpressError(code, detail, hint=hint), request, status=status, headers=headers)


def _methods_of(request: Request) -> list[str]:
    """What an address takes. The framework names the methods of the first of its routes alone."""
    routes: Iterable[Route] = request.app.state.routes
    here = [one for one in routes if one.matches(request.scope)[0] is not Match.NONE]
    here = [one for one in here if one.path == request.url.path] or here  # one that is written out hides a pattern
    return sorted({method for one in here for method in one.methods or ()})


async def on_unexpected(request: Request, error: Exception) -> Response:
    """A bug of ours. The client gets a number to quote, the log gets the traceback."""
    request_id = request.scope.get("state", {}).get("request_id", "")
    log.error("request %s: unexpected error", request_id, exc_info=error, extra={"request_id": request_id})
    return problem(
        NightpressError(
            ErrorCode.INTERNAL,
            "The server failed to answer this request.",
            hint=f"Quote the request id {request_id} when asking for help.",
        ),
        request,
    )


def install(app: FastAPI, routes: Sequence[Route]) -> None:
    """Handle our own errors, the framework's and the unexpected ones alike. `routes`: every one there is."""
    app.state.routes = routes
    app.add_exception_handler(NightpressError, _on_nightpress_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(HTTPException, _on_http_exception)


def documented(*codes: ErrorCode) -> dict[int | str, dict[str, Any]]:
    """OpenAPI `responses` for the given codes: one entry a status, an example a code."""
    found: dict[int | str, dict[str, Any]] = {}
    for code in codes:
        kind = ERROR_KINDS[code]
        entry = found.setdefault(kind.status, {"description": kind.title, "content": {MEDIA_TYPE: {"examples": {}}}})
        content = entry["content"][MEDIA_TYPE]
        content["schema"] = {"$ref": "#/components/schemas/Problem"}
        content["examples"][code.value] = {
            "value": {
                "type": f"urn:nightpress:error:{code.value}",
                "title": kind.title,
                "status": kind.status,
                "detail": "What happened, in a sentence.",
                "code": code.value,
                "hint": "What to do about it.",
                "instance": "/v1/jobs",
                "request_id": "req_01jd5x8w3f6v9k2m4n7p0q1r5t",
                "errors": [],
            }
        }
    return found
