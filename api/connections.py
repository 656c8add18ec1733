"""Bounds on what a connection may take before anybody knows whose it is. uvicorn bounds no request's head and waits for it without end.

A client that is waited for has a deadline in each phase: for the whole head of a request, for each piece of its body, and to take the
answer. Connections are bounded in all and by address. When there is no room, the one that has been without a request for longest is
closed for the newcomer, so that idle and half-open connections never keep anybody out.
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

_HEAD_BYTES = 32 * 1024  #: of a request line and its headers
_HEADERS = 100
_BODY_BYTES_S = 1024  #: what a body must bring at least, while the API reads it
_FILES_KEPT = 256  #: of the process's file handles, for everything but connections
_STATUS_LINES = {400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large", 503: "Service Unavailable"}  # fmt: skip


@dataclass(frozen=True)
class Bounds:
    connections: int
    connections_per_address: int
    patience_s: float  #: how long a client may leave the API waiting


def bounds_of(settings: Settings) -> Bounds:
    """The settings' bounds, as far as this process's file handles go: a connection is one, and the database and storage need some."""
    handles, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = settings.api_connections if handles == resource.RLIM_INFINITY else max(handles - _FILES_KEPT, handles // 2)
    return Bounds(
        connections=min(settings.api_connections, room),
        connections_per_address=settings.api_connections_per_address,
        patience_s=settings.api_client_patience_s,
    )


def configure(app: Any, settings: Settings, **more: Any) -> uvicorn.Config:
    """uvicorn's configuration with these bounds, the same for every way the API is started."""
    protocol: Any = partial(Connection, Connections(bounds_of(settings)))
    return uvicorn.Config(
        app,
        http=protocol,
        log_config=None,  # ours is set, and it redacts
        access_log=False,  # /metrics counts; a line a request would cost more than the request
        server_header=False,
        timeout_keep_alive=30,
        **more,
    )


class Connections:
    """The open connections of one process, by address, and which of them may be closed for a newcomer."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self._open: Counter[str] = Counter()
        self._idle, self._reading = _Queue(), _Queue()

    def enter(self, connection: "Connection") -> bool:
        """Whether there is room for it, made if need be: by one that waits for a request, else by one whose body is still to come."""
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
        """It has no request: the head of one has not come."""
        self._idle.add(connection)

    def reads(self, connection: "Connection") -> None:
        """The body of its request has not come."""
        self._idle.discard(connection)
        self._reading.add(connection)

    def answers(self, connection: "Connection") -> None:
        """Its request is whole: it is not closed for another."""
        self._idle.discard(connection)
        self._reading.discard(connection)


class _Queue:
    """Connections in the order in which they came, in all and by address."""

    def __init__(self) -> None:
        self._all: dict[Connection, None] = {}
        self._from: dict[str, dict[Connection, None]] = {}

    def add(self, connection: "Connection") -> None:
        self._all[connection] = None
        self._from.setdefault(connection.address, {})[connection] = None

    def discard(self, connection: "Connection") -> None:
        if connection in self._all:
            del self._all[connection]
            mine = self._from[connection.address]
            del mine[connection]
            if not mine:
                del self._from[connection.address]

    def first(self, address: str | None) -> "Connection | None":
        """The one that came first; of an address, if one is given."""
        return next(iter(self._all if address is None else self._from.get(address, {})), None)


class Connection(HttpToolsProtocol):
    """uvicorn's protocol with a deadline for whatever the client must do next, and bounds on a request's head."""

    def __init__(self, connections: Connections, **given: Any) -> None:
        super().__init__(**given)
        self._connections, self._bounds = connections, connections.bounds
        self.address = ""
        self._deadline: asyncio.TimerHandle | None = None  #: for the head or the body of a request
        self._write_deadline: asyncio.TimerHandle | None = None
        self._phase: Literal["head", "body", "answer"] = "head"  #: of the newest request, what is awaited
        self._in_head = False  #: whether a head has begun and is not whole
        self._head_bytes = 0  #: at least what came of it
        self._body_bytes = 0  #: since the deadline was set
        self._was_paused = False  #: whether the API itself stopped reading in the deadline's time before
        self._refused = False

    # Coming and going --------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.address = self.client[0] if self.client else ""
        if not self._connections.enter(self):
            self._refuse(503, "The API has as many connections as it can serve.", "Come back in a few seconds.")
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
        elif self._phase == "head" and self._deadline is None:  # kept alive, and the next request has begun
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
        """Both the request and its answer are over: wait for the next, or go on with one that came meanwhile."""
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
                f"The request's {what} did not come within {self._bounds.patience_s:g} s.",
                "Send the request again, in one go.",
            )

    def _body_comes(self) -> bool:
        """Whether the body brought enough since the deadline was set, or it was the API that did not read."""
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

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - the server's words; ours stand in a problem
        if not self._refused:
            self._refuse(400, "This is no HTTP request.", "")

    def _refuse_head(self) -> None:
        said = f"The request's head has more than {_HEADERS} headers or {_HEAD_BYTES} bytes."
        self._refuse(431, said, "Shorten its address and headers.")

    def _refuse(self, status: int, message: str, hint: str) -> None:
        """Answer outside of any route, and close."""
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
