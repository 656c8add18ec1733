"""Server-sent events: the events or log lines of a job or a study after a given number, until it ends. No line is skipped or repeated."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from fastapi import Request
from starlette.responses import Response, StreamingResponse

from nightpress.api.deps import Services
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.numbers import whole_number
from nightpress.core.service.jobs.positions import Position
from nightpress.core.service.jobs.records import Event, LogLine
from nightpress.core.wire.base import View
from nightpress.core.wire.jobs import TERMINAL_STATES, EventView, LogView

MEDIA_TYPE = "text/event-stream"
HEARTBEAT_S = 15.0  #: seconds between comment lines: they keep proxies open, and detect disconnected readers
LONGEST_S = 600.0  #: seconds until the stream ends; the reader reconnects with Last-Event-ID
_PAGE = 200
_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}

Line = TypeVar("Line", Event, LogLine)


@dataclass(frozen=True)
class LineKind(Generic[Line]):
    """A kind of numbered lines, and how answers show them."""

    view: type[View]  #: a line in JSON
    name: Callable[[Line], str]  #: the name of a line's SSE message
    newest: Callable[[Position], int]  #: the number of the newest line at a position

    def shown(self, line: Line) -> View:
        return self.view.model_validate(line, from_attributes=True)

    def message(self, line: Line) -> str:
        return f"id: {line.seq}\nevent: {self.name(line)}\ndata: {self.shown(line).model_dump_json()}\n\n"


EVENTS: LineKind[Event] = LineKind(EventView, lambda event: event.kind, lambda position: position.event_seq)
LOGS: LineKind[LogLine] = LineKind(LogView, lambda _line: "log", lambda position: position.log_seq)


class Subject(Protocol):
    """What has the lines: a job or a study."""

    @property
    def id(self) -> str: ...
    @property
    def state(self) -> str: ...


def wants_stream(request: Request) -> bool:
    """Whether the caller asks for a stream."""
    return MEDIA_TYPE in request.headers.get("accept", "")


def resume_point(request: Request, after: int) -> int:
    """The number after which a stream begins: Last-Event-ID if the reader reconnects, else `after`.

    Raises NightpressError(invalid_request) for a Last-Event-ID that is not a number.
    """
    raw = request.headers.get("last-event-id", "").strip()
    if not raw:
        return after
    number = whole_number(raw)
    if number is None:
        raise NightpressError(
            ErrorCode.INVALID_REQUEST, "Last-Event-ID is not a number.", hint="Send the last `id` that you received."
        )
    return number


async def stream(
    request: Request,
    services: Services,
    subject: Subject,
    kind: LineKind[Line],
    read: Callable[..., Sequence[Line]],
    *,
    after: int,
) -> Response:
    """The response with every line after number `after`, including lines that come later. It ends when the subject has ended and all is sent.

    `read` reads lines from SQL. If the subject has ended and nothing is left to send, the answer is 204: then an EventSource does not reconnect.
    """
    request.scope["nightpress.stream"] = True
    if subject.state in TERMINAL_STATES and not await services.call(read, subject.id, after=after, limit=1):
        return Response(status_code=204)
    return StreamingResponse(_frames(services, subject, kind, read, after), headers=_HEADERS, media_type=MEDIA_TYPE)


async def _frames(
    services: Services,
    subject: Subject,
    kind: LineKind[Line],
    read: Callable[..., Sequence[Line]],
    after: int,
) -> AsyncIterator[str]:
    ends_at = time.monotonic() + LONGEST_S
    ended = subject.state in TERMINAL_STATES
    with services.tail.watch(subject.id) as watch, services.metrics.streams.track_inprogress():
        yield "retry: 1000\n\n"
        unread = True
        while True:
            while unread:
                found = await services.call(read, subject.id, after=after, limit=_PAGE)
                if found:
                    after = found[-1].seq
                    yield "".join(map(kind.message, found))
                unread = len(found) == _PAGE
            if ended or services.tail.closed or time.monotonic() >= ends_at:
                return
            try:
                await asyncio.wait_for(watch.changed.wait(), min(HEARTBEAT_S, ends_at - time.monotonic()))
            except TimeoutError:
                yield ": still here\n\n"
            watch.changed.clear()
            if watch.position is not None:
                # The last line is written in the transaction that ends the subject, so the next read sees it.
                ended = watch.position.state in TERMINAL_STATES
                unread = kind.newest(watch.position) > after
