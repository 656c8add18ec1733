"""The middleware of every request: request id, limit of the body, latency, trace, and unexpected errors."""

import re
import time
from contextlib import AbstractContextManager, nullcontext

from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nightpress.api.actions import note_action
from nightpress.api.metrics import ApiMetrics
from nightpress.api.problems import on_unexpected, problem
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.ids import new_id
from nightpress.core.logs import log_context
from nightpress.core.numbers import whole_number
from nightpress.core.tracing import NOT_TRACED, SpanNotes, span

REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
#: Routes that take files limit their body themselves, by the announced size.
_STREAMING = re.compile(r"/v1/(models|datasets)/[^/]+/parts/[^/]+")
_TOO_LONG = 1 << 62  #: in place of a Content-Length that is not a number
_UNTRACED = frozenset({"/healthz", "/readyz", "/metrics"})


class RequestMiddleware:
    """A plain ASGI middleware. It makes no task, queue or copy of the body, because every request passes through it."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int, metrics: ApiMetrics) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        request_id, length = _read_headers(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                await note_action(scope, status)
                message["headers"] = [
                    *message.get("headers", ()),
                    *scope["state"].get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        try:
            refusal = self._refuse(scope, length)
            if refusal is not None:
                await problem(refusal, Request(scope))(scope, receive, send_marked)
            else:
                with log_context(request_id=request_id), _traced(scope, request_id) as here:
                    await self.app(scope, self._bounded(scope, receive), send_marked)
                    here.update_name(f"{scope['method']} {getattr(scope.get('route'), 'path', '(none)')}")
                    here.set_attributes({"http.response.status_code": status})
        except ClientDisconnect:
            pass  # the client has disconnected
        except Exception as error:
            if status:  # the answer has begun, so the server can only close the connection
                raise
            response = await on_unexpected(Request(scope), error)
            await response(scope, receive, send_marked)
        finally:
            self.metrics.observe(scope, status, time.perf_counter() - began)

    def _refuse(self, scope: Scope, length: int) -> NightpressError | None:
        if length > self.max_body_bytes and not _STREAMING.fullmatch(scope["path"]):
            return NightpressError(
                ErrorCode.PAYLOAD_TOO_LARGE,
                f"The body has {length} bytes; at most {self.max_body_bytes} are allowed.",
                hint="Upload models and data sets as files: announce them first, then send their parts.",
            )
        # PostgreSQL refuses NUL in text, and no valid name contains it.
        if "\0" in scope["path"] or b"%00" in scope["query_string"]:
            return NightpressError(ErrorCode.INVALID_REQUEST, "The address holds a NUL character.", hint="Remove it.")
        return None

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        """Count the bytes of a body: its Content-Length may be missing or wrong."""
        if scope["method"] in {"GET", "HEAD"} or _STREAMING.fullmatch(scope["path"]):
            return receive
        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_body_bytes:
                raise HTTPException(413, f"The body has more than {self.max_body_bytes} bytes.")
            return message

        return bounded


def _traced(scope: Scope, request_id: str) -> AbstractContextManager[SpanNotes]:
    """The span of a request, as a child of the caller's span if the header `traceparent` names it. Probes and scrapes are not traced."""
    if scope["path"] in _UNTRACED:
        return nullcontext(NOT_TRACED)
    caller = next(
        (value.decode("ascii", "replace") for name, value in scope["headers"] if name == b"traceparent"), None
    )
    about = {"http.request.method": scope["method"], "nightpress.request_id": request_id}
    return span(scope["method"], about, parent=caller, kind="server")


def _read_headers(scope: Scope) -> tuple[str, int]:
    """The request id (the caller's if it is valid, else a new one), and the announced length of the body."""
    request_id, length = "", 0
    for name, value in scope["headers"]:
        if name == b"x-request-id" and REQUEST_ID.fullmatch(value):
            request_id = value.decode()
        elif name == b"content-length":
            announced = whole_number(value.decode("latin-1"))
            length = _TOO_LONG if announced is None else announced
    return request_id or new_id("req"), length
