"""Jobs: submit, list, get, cancel, retry."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Query, Request
from starlette.responses import Response

from nightpress.api.deps import Cursor, JobsReader, JobsWriter, Limit, Services, ServicesDep
from nightpress.api.once import OnceRoute, key_of
from nightpress.api.problems import documented
from nightpress.api.routes import answer
from nightpress.api.waiting import PARAMETER, preferred_wait, until_ended
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.service.access.keys import Principal
from nightpress.core.service.jobs.queries import JobsWanted
from nightpress.core.service.jobs.records import Job
from nightpress.core.service.jobs.requests import MAX_CANCELLED
from nightpress.core.wire.base import Moment, Page
from nightpress.core.wire.costs import CostView
from nightpress.core.wire.jobs import CancelledView, JobBatch, JobBatchView, JobCreate, JobFilter, JobState, JobView

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], route_class=OnceRoute)
_WAITS: dict[str, Any] = {"parameters": [PARAMETER]}

_EXAMPLES = {
    "built-in recipe": {
        "summary": "A built-in recipe on the newest model of this name",
        "value": {"model": "all-minilm-l6-v2", "recipe": "int8-encoder", "labels": {"team": "search"}},
    },
    "own recipe": {
        "summary": "A recipe of your own",
        "value": {
            "model": "all-minilm-l6-v2",
            "recipe": {
                "name": "my-int8",
                "passes": [{"pass": "weight-only", "bits": 8}],
                "exports": ["compressed-tensors"],
                "gates": {"cosine": ">= 0.99", "size": "<= 60%"},
            },
            "priority": 10,
        },
    },
}


@router.post(
    "",
    status_code=201,
    response_model=JobView,
    summary="Submit a job",
    openapi_extra=_WAITS,
    responses={
        200: {
            "model": JobView,
            "description": "The job of an earlier request with this body and the same Idempotency-Key.",
        },
        **documented(
            ErrorCode.INVALID_REQUEST,
            ErrorCode.INVALID_RECIPE,
            ErrorCode.CANNOT_FIT,
            ErrorCode.UNSUPPORTED_ARCHITECTURE,
            ErrorCode.IDEMPOTENCY_MISMATCH,
            ErrorCode.NOT_FOUND,
            ErrorCode.CONFLICT,
            ErrorCode.PAYLOAD_TOO_LARGE,
            ErrorCode.QUOTA_EXCEEDED,
        ),
    },
)
async def create_job(
    request: Request,
    caller: JobsWriter,
    services: ServicesDep,
    body: Annotated[JobCreate, Body(openapi_examples=_EXAMPLES)],
) -> Response:
    job, created = await services.call(
        services.resources.jobs.submit, caller.tenant_id, body, key_of(request), key_id=caller.key_id
    )
    if created and job.state == "queued":
        services.ringer.ring(job.queue)
    return await _in_time(request, services, job, status=201 if created else 200)


@router.post(
    ":batch",
    status_code=201,
    response_model=JobBatchView,
    summary="Submit up to 100 jobs, all or none",
    description="Where a job is invalid none is submitted, and `errors` names each fault with the index of its job.",
    responses=documented(
        ErrorCode.INVALID_REQUEST,
        ErrorCode.INVALID_RECIPE,
        ErrorCode.CANNOT_FIT,
        ErrorCode.UNSUPPORTED_ARCHITECTURE,
        ErrorCode.NOT_FOUND,
        ErrorCode.CONFLICT,
        ErrorCode.PAYLOAD_TOO_LARGE,
        ErrorCode.QUOTA_EXCEEDED,
    ),
)
async def create_jobs(caller: JobsWriter, services: ServicesDep, body: JobBatch) -> Response:
    made = await services.call(services.resources.jobs.submit_all, caller.tenant_id, body.jobs, key_id=caller.key_id)
    for queue in {job.queue for job in made if job.state == "queued"}:
        services.ringer.ring(queue)
    return answer(JobBatchView(items=await _views(services, made)), status=201)


@router.post(
    ":cancel",
    response_model=CancelledView,
    summary="Cancel every job that matches",
    description=f"Newest first, {MAX_CANCELLED} at most. `more` says whether to send the request again.",
    responses=documented(ErrorCode.INVALID_REQUEST),
)
async def cancel_jobs(caller: JobsWriter, services: ServicesDep, body: JobFilter) -> Response:
    wanted = JobsWanted(
        states=tuple(body.state),
        labels=body.labels,
        model=body.model,
        queue=body.queue,
        created_after=body.created_after,
        created_before=body.created_before,
    )
    count, more = await services.call(services.resources.store.requests.cancel_all, caller.tenant_id, wanted)
    return answer(CancelledView(cancelled=count, more=more))


@router.get(
    "",
    response_model=Page[JobView],
    summary="List jobs, newest first",
    responses=documented(ErrorCode.INVALID_REQUEST),
)
async def list_jobs(
    caller: JobsReader,
    services: ServicesDep,
    state: Annotated[list[JobState], Query(max_length=6, description="Repeat for several.")] = [],  # noqa: B006
    label: Annotated[
        list[str], Query(max_length=32, description="`key=value`; repeat for several: all must match.")
    ] = [],  # noqa: B006
    model: Annotated[str | None, Query(max_length=128, description="A model's id or name.")] = None,
    queue: Annotated[Literal["cpu", "gpu"] | None, Query()] = None,
    created_after: Annotated[Moment | None, Query(description="At this moment or later.")] = None,
    created_before: Annotated[Moment | None, Query()] = None,
    cursor: Cursor = None,
    limit: Limit = 50,
) -> Response:
    jobs, next_cursor = await services.call(
        services.resources.store.reader.page,
        caller.tenant_id,
        JobsWanted(tuple(state), _labels(label), model, queue, created_after, created_before),
        cursor=cursor,
        limit=limit,
    )
    return answer(Page[JobView](items=await _views(services, jobs), next_cursor=next_cursor))


@router.get(
    "/{job_id}",
    response_model=JobView,
    summary="Get a job",
    responses=documented(ErrorCode.NOT_FOUND),
    openapi_extra=_WAITS,
)
async def get_job(request: Request, job_id: str, caller: JobsReader, services: ServicesDep) -> Response:
    return await _in_time(request, services, await own_job(services, caller, job_id))


@router.post(
    "/{job_id}/cancel",
    response_model=JobView,
    summary="Cancel a job",
    description="A queued job is cancelled at once. A running job is `cancelling` until its worker has stopped. A job that has ended stays as it is.",
    responses=documented(ErrorCode.NOT_FOUND),
)
async def cancel_job(job_id: str, caller: JobsWriter, services: ServicesDep) -> Response:
    job = await services.call(services.resources.store.requests.request_cancel, caller.tenant_id, job_id)
    if job is None:
        raise missing_job()
    return await _answer_with(services, job)


@router.post(
    "/{job_id}/retry",
    status_code=201,
    response_model=JobView,
    summary="Run a finished job again, as a new job",
    responses=documented(ErrorCode.NOT_FOUND, ErrorCode.CONFLICT, ErrorCode.QUOTA_EXCEEDED),
)
async def retry_job(job_id: str, caller: JobsWriter, services: ServicesDep) -> Response:
    job = await services.call(services.resources.jobs.retry, caller.tenant_id, job_id, key_id=caller.key_id)
    services.ringer.ring(job.queue)
    return await _answer_with(services, job, status=201)


async def own_job(services: Services, caller: Principal, job_id: str) -> Job:
    """The caller's job. Raises NightpressError(not_found) also for another tenant's job: the answer must not show that it exists."""
    job = await services.call(services.resources.store.reader.get, caller.tenant_id, job_id)
    if job is None:
        raise missing_job()
    return job


def missing_job() -> NightpressError:
    return NightpressError(
        ErrorCode.NOT_FOUND, "There is no such job.", hint="GET /v1/jobs lists yours; `nightpress ls` does too."
    )


async def _views(services: Services, jobs: Sequence[Job]) -> list[JobView]:
    views = [JobView.model_validate(job, from_attributes=True) for job in jobs]
    ledger = services.resources.costs
    run = [job.id for job in jobs if job.attempt]
    if ledger.prices:
        costs = (await services.call(ledger.of_jobs, run) if run else None) or {}
        currency = ledger.prices.currency
        views = [
            view.model_copy(update={"cost": CostView(amount=costs.get(view.id, 0.0), currency=currency)})
            for view in views
        ]
    if any(job.state == "queued" for job in jobs):
        fleet = await services.call(services.resources.jobs.fleet)
        return [view.model_copy(update={"notice": fleet.notice(job)}) for view, job in zip(views, jobs, strict=True)]
    return views


async def _answer_with(services: Services, job: Job, *, status: int = 200) -> Response:
    (view,) = await _views(services, [job])
    return answer(view, status=status, headers={"Location": f"/v1/jobs/{job.id}"} if status == 201 else None)


async def _in_time(request: Request, services: Services, job: Job, *, status: int = 200) -> Response:
    """The response with the job. If the caller prefers to wait, it is sent when the job has ended or the wait is over."""
    wait_s = preferred_wait(request)
    if not wait_s:
        return await _answer_with(services, job, status=status)
    response = await _answer_with(services, await until_ended(services, job, wait_s), status=status)
    response.headers["Preference-Applied"] = f"wait={wait_s}"
    return response


def _labels(raw: list[str]) -> dict[str, str]:
    for label in raw:
        if "=" not in label:
            raise NightpressError(
                ErrorCode.INVALID_REQUEST, f"label: {label[:100]!r} is not `key=value`.", hint="E.g. ?label=team=search"
            )
    return dict(label.split("=", 1) for label in raw)
