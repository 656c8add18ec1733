"""The errors of the API: RFC 9457 `application/problem+json`, with a code from the closed set in core/errors.py."""

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
RETRY_AFTER_S = 5  #: Retry-After of 429 and 503, unless the error has its own value
_MAX_FAULTS = 50

#: Statuses that the framework chooses. 405 and 415 have no code of their own: their requests are invalid.
_FRAMEWORK_CODES = {
    401: ErrorCode.UNAUTHENTICATED,
    403: ErrorCode.FORBIDDEN,
    404: ErrorCode.NOT_FOUND,
    413: ErrorCode.PAYLOAD_TOO_LARGE,
    429: ErrorCode.RATE_LIMITED,
}
_FRAMEWORK_DETAILS = {
    404: ("There is nothing at this address.", "/docs lists the addresses."),
    405: ("This address doesn't allow this method.", "The Allow header names the methods that it allows."),
}


def problem(
    error: NightpressError,
    request: Request,
    *,
    status: int | None = None,
    headers: dict[str, str] | None = None,
    faults: list[dict[str, Any]] | None = None,
) -> Response:
    """The response for an error. `status` replaces the status of its code, e.g. with 405. `faults`: the invalid fields."""
    return Response(
        json.dumps(problem_body(error, request.scope, status=status, faults=faults)),
        status_code=status or error.kind.status,
        headers=problem_headers(error, status) | (headers or {}),
        media_type=MEDIA_TYPE,
    )


def problem_body(
    error: NightpressError, scope: Any, *, status: int | None = None, faults: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """The members of a problem. Details of the error are extension members (RFC 9457 §3.2)."""
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
    """The headers of a problem: Retry-After for 429 and 503, WWW-Authenticate for 401."""
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
    # The input is not repeated: it may be large, and it may hold secrets.
    faults = [
        {"at": ".".join(str(part) for part in fault["loc"]), "problem": fault["msg"], "type": fault["type"]}
        for fault in error.errors()[:_MAX_FAULTS]
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
        status = 422  # a body that is not JSON: the status of every other invalid request
    if status == 405:
        headers["Allow"] = ", ".join(_methods_of(request))
    code = _FRAMEWORK_CODES.get(status)
    if code is None:
        code = ErrorCode.INVALID_REQUEST if status < 500 else ErrorCode.INTERNAL
    detail, hint = _FRAMEWORK_DETAILS.get(status, (str(error.detail), ""))
    return problem(NightpressError(code, detail, hint=hint), request, status=status, headers=headers)


def _methods_of(request: Request) -> list[str]:
    """The methods that an address allows. The framework names only those of the first matching route."""
    routes: Iterable[Route] = request.app.state.routes
    matching = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    # A route with exactly this path hides those whose pattern matches it too.
    matching = [route for route in matching if route.path == request.url.path] or matching
    return sorted({method for route in matching for method in route.methods or ()})


async def on_unexpected(request: Request, error: Exception) -> Response:
    """The response for an unexpected error. The client gets the request id to quote, the log gets the traceback."""
    request_id = request.scope.get("state", {}).get("request_id", "")
    log.error("request %s: unexpected error", request_id, exc_info=error, extra={"request_id": request_id})
    return problem(
        NightpressError(
            ErrorCode.INTERNAL,
            "The server failed to answer this request.",
            hint=f"Quote the request id {request_id} when you ask for help.",
        ),
        request,
    )


def install(app: FastAPI, routes: Sequence[Route]) -> None:
    """Turn our errors and the framework's into problems. `routes`: all routes of the application."""
    app.state.routes = routes
    app.add_exception_handler(NightpressError, _on_nightpress_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(HTTPException, _on_http_exception)


def documented(*codes: ErrorCode) -> dict[int | str, dict[str, Any]]:
    """OpenAPI `responses` for error codes: an entry for each status, with an example for each code."""
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
