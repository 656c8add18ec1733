"""Server-sent events: a job's history or log, from a cursor to its end, without a gap and without a double."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TypeVar

from fastapi import Request
from starlette.responses import Response, StreamingResponse

from nightpress.api.deps import Services
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.numbers import whole_number
from nightpress.core.service.jobs.positions import Position
from nightpress.core.service.jobs.records import Event, Job, LogLine
from nightpress.core.wire.jobs import TERMINAL_STATES

MEDIA_TYPE = "text/event-stream"
HEARTBEAT_S = 15.0  #: a comment line so often, so that proxies keep the connection and we notice a reader that went
LONGEST_S = 600.0  #: then the stream ends and the reader comes back with Last-Event-ID
_PAGE = 200
_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


Line = TypeVar("Line", Event, LogLine)


def wants_stream(request: Request) -> bool:
    return MEDIA_TYPE in request.headers.get("accept", "")


def resume_point(request: Request, after: int) -> int:
    """Where a stream begins: after Last-Event-ID where the reader was cut off, else after `after`."""
    raw = request.headers.get("last-event-id", "").strip()
    if not raw:
        return after
    number = whole_number(raw)
    if number is None:
        raise NightpressError(
            ErrorCode.INVALID_REQUEST, "Last-Event-ID is not a number.", hint="Send the last `id` that was received."
        )
    return number


async def stream(
    request: Request,
    services: Services,
    job: Job,
    *,
    after: int,
    read: Callable[..., Sequence[Line]],
    newest: Callable[[Position], int],
    frame: Callable[[Line], str],
) -> Response:
    """Answer with every line after `after`, those to come included. Ends when the job has ended and all was sent.

    Where nothing is left to send and nothing can come, 204 tells an EventSource not to come back.
    """
    request.scope["nightpress.stream"] = True
    if job.state in TERMINAL_STATES and not await services.call(read, job.id, after=after, limit=1):
        return Response(status_code=204)
    return StreamingResponse(
        _frames(services, job, after, read, newest, frame), headers=_HEADERS, media_type=MEDIA_TYPE
    )


async def _frames(
    services: Services,
    job: Job,
    after: int,
    read: Callable[..., Sequence[Line]],
    newest: Callable[[Position], int],
    frame: Callable[[Line], str],
) -> AsyncIterator[str]:
    ends_at = time.monotonic() + LONGEST_S
    ended = job.state in TERMINAL_STATES
    with services.tail.watch(job.id) as watch, services.metrics.streams.track_inprogress():
        yield "retry: 1000\n\n"
        unread = True
        while True:
            while unread:
                lines = await services.call(read, job.id, after=after, limit=_PAGE)
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
                # Whoever ended the job wrote its last line in the same transaction, so the read that follows sees it.
                ended = watch.position.state in TERMINAL_STATES
                unread = newest(watch.position) > after
