"""Limits on connections, before the key is known. uvicorn limits neither the size of a request's head nor the time to send it.

A client has a deadline in each phase of a request: to send the whole head, to send each piece of the body, and to read the answer.
The number of connections is limited, in total and per address. When a limit is reached, a new connection replaces the connection that
has waited longest for a request, so that idle and half-open connections can't block new clients.
"""

import asyncio
import json
import resource
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from nightpress.api.problems import MEDIA_TYPE, problem_body
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.settings import Settings

_HEAD_BYTES = 32 * 1024  #: most bytes of a request line and its headers
_HEADERS = 100
_BODY_BYTES_S = 1024  #: fewest bytes of a body per second, while the API reads it
_OTHER_HANDLES = 256  #: file handles of the process that are not for connections
_STATUS_LINES = {400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large", 503: "Service Unavailable"}  # fmt: skip


@dataclass(frozen=True)
class Bounds:
    connections: int
    connections_per_address: int
    patience_s: float  #: seconds that the API waits for a client


def bounds_of(settings: Settings) -> Bounds:
    """The bounds of the settings, lowered to the file handles of this process: each connection needs one."""
    handles, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = (
        settings.api_connections if handles == resource.RLIM_INFINITY else max(handles - _OTHER_HANDLES, handles // 2)
    )
    return Bounds(
        connections=min(settings.api_connections, room),
        connections_per_address=settings.api_connections_per_address,
        patience_s=settings.api_client_patience_s,
    )


def configure(app: Any, settings: Settings, **more: Any) -> uvicorn.Config:
    """uvicorn's configuration with these bounds. Every way to start the API uses it."""
    protocol: Any = partial(Connection, Connections(bounds_of(settings)))
    return uvicorn.Config(
        app,
        http=protocol,
        log_config=None,  # core.logs has configured logging; it removes secrets
        access_log=False,  # /metrics counts requests; a log line costs more than a request
        server_header=False,
        timeout_keep_alive=30,
        **more,
    )


class Connections:
    """The open connections of this process, per address, and those that a new connection may replace."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self._open: Counter[str] = Counter()
        self._idle, self._reading = _Arrivals(), _Arrivals()

    def enter(self, connection: "Connection") -> bool:
        """Count a new connection. Returns False if there is no room for it.

        If a limit is reached, the oldest connection without a request is closed; if there is none, the oldest with an incomplete body.
        """
        full_address = self._open[connection.address] >= self.bounds.connections_per_address
        full = self._open.total() >= self.bounds.connections
        self._open[connection.address] += 1
        if not full and not full_address:
            return True
        address = connection.address if full_address else None
        longest = self._idle.first(address) or self._reading.first(address)
        if longest is None:
            return False
        self.answers(longest)
        longest.transport.abort()
        return True

    def leave(self, connection: "Connection") -> None:
        self.answers(connection)
        self._open[connection.address] -= 1
        if not self._open[connection.address]:
            del self._open[connection.address]

    def waits(self, connection: "Connection") -> None:
        """Record that the connection has no request yet: it may be replaced."""
        self._idle.add(connection)

    def reads(self, connection: "Connection") -> None:
        """Record that the body of its request is incomplete: it may be replaced if every connection has a request."""
        self._idle.discard(connection)
        self._reading.add(connection)

    def answers(self, connection: "Connection") -> None:
        """Record that its request is complete: it may not be replaced."""
        self._idle.discard(connection)
        self._reading.discard(connection)


class _Arrivals:
    """Connections in the order of their arrival, in total and per address."""

    def __init__(self) -> None:
        self._all: dict[Connection, None] = {}
        self._from: dict[str, dict[Connection, None]] = {}

    def add(self, connection: "Connection") -> None:
        self._all[connection] = None
        self._from.setdefault(connection.address, {})[connection] = None

    def discard(self, connection: "Connection") -> None:
        if connection in self._all:
            del self._all[connection]
            same_address = self._from[connection.address]
            del same_address[connection]
            if not same_address:
                del self._from[connection.address]

    def first(self, address: str | None) -> "Connection | None":
        """The oldest connection from this address; `address` None: the oldest of all. None if there is none."""
        return next(iter(self._all if address is None else self._from.get(address, {})), None)


class Connection(HttpToolsProtocol):
    """uvicorn's protocol, with a deadline for each step of the client and limits on a request's head."""

    def __init__(self, connections: Connections, **given: Any) -> None:
        super().__init__(**given)
        self._connections, self._bounds = connections, connections.bounds
        self.address = ""
        self._deadline: asyncio.TimerHandle | None = None  #: for the head or the body of a request
        self._write_deadline: asyncio.TimerHandle | None = None
        self._phase: Literal["head", "body", "answer"] = "head"  #: the next part of the newest request
        self._in_head = False  #: whether a head has begun and is incomplete
        self._head_bytes = 0  #: bytes of the head that have arrived, at least
        self._body_bytes = 0  #: bytes of the body that have arrived since the deadline was set
        self._was_paused = False  #: whether the API itself had stopped reading when the last deadline passed
        self._refused = False

    # Opening and closing -----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.address = self.client[0] if self.client else ""
        if not self._connections.enter(self):
            self._refuse(503, "The API has as many connections as it can serve.", "Try again in a few seconds.")
            return
        self._connections.waits(self)
        self._set_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.leave(self)
        for timer in (self._deadline, self._write_deadline):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    # A request ---------------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._phase == "body":
            self._body_bytes += len(data)
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and (self._head_bytes > _HEAD_BYTES or len(self.headers) > _HEADERS):
            self._refuse_head()
        elif self._phase == "head" and self._deadline is None:  # the next request on a kept connection has begun
            self._set_deadline()

    def on_message_begin(self) -> None:
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        head = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if head > _HEAD_BYTES or len(self.headers) > _HEADERS:
            self._refuse_head()
            return
        self._phase, self._body_bytes, self._was_paused = "body", 0, False
        self._set_deadline()
        self._connections.reads(self)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._refused:
            return
        super().on_message_complete()
        self._phase = "answer"
        self._connections.answers(self)
        self._clear_deadline()
        self._await_request()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._await_request()

    def _await_request(self) -> None:
        """Wait for the next request, if the last request and its answer are complete and no request is queued."""
        if self._phase == "answer" and self.cycle.response_complete and not self.pipeline:
            self._phase = "head"
            self._connections.waits(self)

    # Deadlines ---------------------------------------------------------------------------------------------------------

    def _set_deadline(self) -> None:
        self._clear_deadline()
        self._deadline = self.loop.call_later(self._bounds.patience_s, self._on_deadline)

    def _clear_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _on_deadline(self) -> None:
        self._deadline = None
        if self.transport.is_closing():
            return
        if self._phase == "body" and self._body_comes():
            self._set_deadline()
        elif self._phase != "answer":
            what = "body" if self._phase == "body" else "head"
            self._refuse(
                408,
                f"The request's {what} did not arrive within {self._bounds.patience_s:g} s.",
                "Send the request again, without a pause.",
            )

    def _body_comes(self) -> bool:
        """Whether enough of the body has arrived since the deadline was set, or the API itself had stopped reading."""
        paused, self._was_paused = self._was_paused, self.flow.read_paused
        enough = self._body_bytes >= _BODY_BYTES_S * self._bounds.patience_s
        self._body_bytes = 0
        return (enough or paused or self._was_paused) and not self.cycle.response_complete

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_deadline = self.loop.call_later(2 * self._bounds.patience_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_deadline is not None:
            self._write_deadline.cancel()
            self._write_deadline = None

    # Refusals ----------------------------------------------------------------------------------------------------------

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - our text is a problem
        if not self._refused:
            self._refuse(400, "This is not an HTTP request.", "")

    def _refuse_head(self) -> None:
        message = f"The request's head has more than {_HEADERS} headers or {_HEAD_BYTES} bytes."
        self._refuse(431, message, "Shorten its address and headers.")

    def _refuse(self, status: int, message: str, hint: str) -> None:
        """Send a problem, outside any route, and close the connection."""
        self._refused = True
        self._clear_deadline()
        if self.cycle is None or not self.cycle.response_started or self.cycle.response_complete:
            error = NightpressError(ErrorCode.INVALID_REQUEST, message, hint=hint)
            body = json.dumps(problem_body(error, {}, status=status)).encode()
            head = (
                f"HTTP/1.1 {status} {_STATUS_LINES[status]}\r\ncontent-type: {MEDIA_TYPE}\r\n"
                f"content-length: {len(body)}\r\nretry-after: 5\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()
