"""A job's events and its log, as JSON or as a stream that a reader can resume."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from nightpress.api import sse
from nightpress.api.deps import JobsReader, ServicesDep
from nightpress.api.problems import documented
from nightpress.api.routes import answer
from nightpress.api.routes.jobs import own_job
from nightpress.core.errors import ErrorCode
from nightpress.core.service.jobs.records import Event, LogLine
from nightpress.core.wire.base import Page
from nightpress.core.wire.jobs import EventView, LogView

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["jobs"])

After = Annotated[int, Query(ge=0, le=10**15, description="Only lines whose `seq` is greater.")]
Lines = Annotated[int, Query(ge=1, le=1000)]

_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "With `Accept: text/event-stream`: an SSE message for each line, with its `seq` as the id, until the job has ended. "
        "`Last-Event-ID` resumes.",
        "content": {sse.MEDIA_TYPE: {"schema": {"type": "string"}}},
    },
    204: {"description": "To a request for a stream: the job has ended and the reader has received everything."},
}


@router.get(
    "/events",
    response_model=Page[EventView],
    summary="List or follow a job's events",
    responses={**_STREAM, **documented(ErrorCode.NOT_FOUND, ErrorCode.INVALID_REQUEST)},
)
async def job_events(
    request: Request, job_id: str, caller: JobsReader, services: ServicesDep, after: After = 0, limit: Lines = 500
) -> Response:
    job = await own_job(services, caller, job_id)
    if sse.wants_stream(request):
        return await sse.stream(
            request,
            services,
            job,
            after=sse.resume_point(request, after),
            read=services.resources.store.reader.events,
            newest=lambda position: position.event_seq,
            frame=lambda event: f"id: {event.seq}\nevent: {event.kind}\ndata: {_event(event).model_dump_json()}\n\n",
        )
    events = await services.call(services.resources.store.reader.events, job_id, after=after, limit=limit)
    return answer(Page[EventView](items=[_event(event) for event in events], next_cursor=_next(events, limit)))


@router.get(
    "/logs",
    response_model=Page[LogView],
    summary="List or follow a job's log",
    responses={**_STREAM, **documented(ErrorCode.NOT_FOUND, ErrorCode.INVALID_REQUEST)},
)
async def job_logs(
    request: Request, job_id: str, caller: JobsReader, services: ServicesDep, after: After = 0, limit: Lines = 500
) -> Response:
    job = await own_job(services, caller, job_id)
    if sse.wants_stream(request):
        return await sse.stream(
            request,
            services,
            job,
            after=sse.resume_point(request, after),
            read=services.resources.store.reader.logs,
            newest=lambda position: position.log_seq,
            frame=lambda line: f"id: {line.seq}\nevent: log\ndata: {_log(line).model_dump_json()}\n\n",
        )
    lines = await services.call(services.resources.store.reader.logs, job_id, after=after, limit=limit)
    return answer(Page[LogView](items=[_log(line) for line in lines], next_cursor=_next(lines, limit)))


def _event(event: Event) -> EventView:
    return EventView.model_validate(event, from_attributes=True)


def _log(line: LogLine) -> LogView:
    return LogView.model_validate(line, from_attributes=True)


def _next(lines: list[Any], limit: int) -> str | None:
    """The value of `after` for the next page; None if this page is the last."""
    return str(lines[-1].seq) if len(lines) == limit else None
