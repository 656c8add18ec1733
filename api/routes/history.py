"""A job's events and its log."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from nightpress.api import sse
from nightpress.api.deps import JobsReader, ServicesDep
from nightpress.api.routes.jobs import own_job
from nightpress.api.routes.lines import After, Lines, documented_lines, page_or_stream
from nightpress.core.wire.base import Page
from nightpress.core.wire.jobs import EventView, LogView

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["jobs"])


@router.get(
    "/events",
    response_model=Page[EventView],
    summary="List or follow a job's events",
    responses=documented_lines("job"),
)
async def job_events(
    request: Request, job_id: str, caller: JobsReader, services: ServicesDep, after: After = 0, limit: Lines = 500
) -> Response:
    job = await own_job(services, caller, job_id)
    read = services.resources.store.reader.events
    return await page_or_stream(request, services, job, sse.EVENTS, read, after=after, limit=limit)


@router.get(
    "/logs",
    response_model=Page[LogView],
    summary="List or follow a job's log",
    responses=documented_lines("job"),
)
async def job_logs(
    request: Request, job_id: str, caller: JobsReader, services: ServicesDep, after: After = 0, limit: Lines = 500
) -> Response:
    job = await own_job(services, caller, job_id)
    read = services.resources.store.reader.logs
    return await page_or_stream(request, services, job, sse.LOGS, read, after=after, limit=limit)
