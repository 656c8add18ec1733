"""Server-sent events: the events or log lines of a job or a study after a given number, until it ends. No line is skipped or repeated."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol, TypeVar

from fastapi import Request
from starlette.responses import Response, StreamingResponse

from nightpress.api.deps import Services
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.numbers import whole_number
from nightpress.core.service.jobs.positions import Position
from nightpress.core.service.jobs.records import Event, LogLine
from nightpress.core.wire.jobs import TERMINAL_STATES

MEDIA_TYPE = "text/event-stream"
HEARTBEAT_S = 15.0  #: seconds between comment lines: they keep proxies open, and detect disconnected readers
LONGEST_S = 600.0  #: seconds until the stream ends; the reader reconnects with Last-Event-ID
_PAGE = 200
_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


Line = TypeVar("Line", Event, LogLine)


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
    *,
    after: int,
    read: Callable[..., Sequence[Line]],
    newest: Callable[[Position], int],
    frame: Callable[[Line], str],
) -> Response:
    """The response with every line after number `after`, including lines that come later. It ends when the subject has ended and all is sent.

    read: reads lines from SQL. newest: the number of the newest line at a position. frame: the SSE message of a line.
    If the subject has ended and nothing is left to send, the answer is 204: then an EventSource does not reconnect.
    """
    request.scope["nightpress.stream"] = True
    if subject.state in TERMINAL_STATES and not await services.call(read, subject.id, after=after, limit=1):
        return Response(status_code=204)
    return StreamingResponse(
        _frames(services, subject, after, read, newest, frame), headers=_HEADERS, media_type=MEDIA_TYPE
    )


async def _frames(
    services: Services,
    subject: Subject,
    after: int,
    read: Callable[..., Sequence[Line]],
    newest: Callable[[Position], int],
    frame: Callable[[Line], str],
) -> AsyncIterator[str]:
    ends_at = time.monotonic() + LONGEST_S
    ended = subject.state in TERMINAL_STATES
    with services.tail.watch(subject.id) as watch, services.metrics.streams.track_inprogress():
        yield "retry: 1000\n\n"
        unread = True
        while True:
            while unread:
                lines = await services.call(read, subject.id, after=after, limit=_PAGE)
                if lines:
                    after = lines[-1].seq
                    yield "".join(frame(line) for line in lines)
                unread = len(lines) == _PAGE
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
                unread = newest(watch.position) > after
