"""Schedules: jobs that are submitted at the times of a cron expression, in a time zone."""

from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Body
from starlette.responses import Response

from nightpress.api.deps import Cursor, JobsReader, JobsWriter, Limit, Services, ServicesDep
from nightpress.api.once import OnceRoute
from nightpress.api.problems import documented
from nightpress.api.routes import answer
from nightpress.api.versions import IfMatch, answer_version, version_of
from nightpress.core.errors import ErrorCode
from nightpress.core.wire.base import Page
from nightpress.core.wire.costs import CostView
from nightpress.core.wire.schedules import ScheduleCreate, ScheduleRunView, ScheduleUpdate, ScheduleView

router = APIRouter(prefix="/v1/schedules", tags=["schedules"], route_class=OnceRoute)

_JOB = {"model": "all-minilm-l6-v2", "recipe": "int8-encoder"}
_EXAMPLES = {
    "every night": {
        "summary": "Every night at two in Berlin, unless nothing has changed",
        "value": {
            "name": "nightly-search",
            "cron": "0 2 * * *",
            "timezone": "Europe/Berlin",
            "only_if_changed": True,
            "job": _JOB,
        },
    },
    "every six hours": {
        "summary": "Every six hours, one after the other, without a gap",
        "value": {"name": "fresh", "cron": "0 */6 * * *", "overlap": "queue", "catch_up": "all", "job": _JOB},
    },
}
_EXAMPLES["a study"] = {
    "summary": "A study every night, which first tries what was best the night before",
    "value": {
        "name": "nightly-study",
        "cron": "0 1 * * *",
        "only_if_changed": True,
        "study": {"model": "all-minilm-l6-v2", "minimize": "latency", "gates": {"cosine": ">= 0.99"}, "hours": 6},
    },
}
_REFUSALS = (
    ErrorCode.INVALID_REQUEST,
    ErrorCode.INVALID_SCHEDULE,
    ErrorCode.INVALID_RECIPE,
    ErrorCode.UNSUPPORTED_ARCHITECTURE,
    ErrorCode.CONFLICT,
)


@router.post(
    "",
    status_code=201,
    response_model=ScheduleView,
    summary="Make a schedule",
    responses=documented(*_REFUSALS, ErrorCode.QUOTA_EXCEEDED),
)
async def create_schedule(
    caller: JobsWriter, services: ServicesDep, body: Annotated[ScheduleCreate, Body(openapi_examples=_EXAMPLES)]
) -> Response:
    schedule = await services.call(services.resources.schedules.create, caller.tenant_id, body, key_id=caller.key_id)
    return answer_version(schedule, status=201, headers={"Location": f"/v1/schedules/{schedule.id}"})


@router.get("", response_model=Page[ScheduleView], summary="List schedules, newest first")
async def list_schedules(
    caller: JobsReader, services: ServicesDep, cursor: Cursor = None, limit: Limit = 50
) -> Response:
    items, following = await services.call(
        services.resources.schedules.store.page, caller.tenant_id, cursor=cursor, limit=limit
    )
    return answer(Page[ScheduleView](items=await _with_costs(services, items), next_cursor=following))


@router.get(
    "/{reference}",
    response_model=ScheduleView,
    summary="Get a schedule by id or name",
    responses=documented(ErrorCode.NOT_FOUND),
)
async def get_schedule(reference: str, caller: JobsReader, services: ServicesDep) -> Response:
    schedule = await services.call(services.resources.schedules.store.get, caller.tenant_id, reference)
    (shown,) = await _with_costs(services, [schedule])
    return answer_version(shown)


@router.patch(
    "/{reference}",
    response_model=ScheduleView,
    summary="Change a schedule",
    description="Fields that are not given stay as they are; `source: null` removes the source. Where the times, the zone or `suspended` change, the next fire is computed anew from now.",
    responses=documented(ErrorCode.NOT_FOUND, ErrorCode.PRECONDITION_FAILED, *_REFUSALS),
)
async def edit_schedule(
    reference: str, caller: JobsWriter, services: ServicesDep, body: ScheduleUpdate, if_match: IfMatch = None
) -> Response:
    return answer_version(
        await services.call(
            services.resources.schedules.edit, caller.tenant_id, reference, body, version=version_of(if_match)
        )
    )


@router.delete(
    "/{reference}",
    status_code=204,
    response_class=Response,
    summary="Delete a schedule with its history; its jobs stay",
    responses=documented(ErrorCode.NOT_FOUND, ErrorCode.PRECONDITION_FAILED),
)
async def delete_schedule(
    reference: str, caller: JobsWriter, services: ServicesDep, if_match: IfMatch = None
) -> Response:
    await services.call(services.resources.schedules.delete, caller.tenant_id, reference, version=version_of(if_match))
    return Response(status_code=204)


@router.post(
    "/{reference}/suspend",
    response_model=ScheduleView,
    summary="Suspend a schedule: no fires until it is resumed",
    responses=documented(ErrorCode.NOT_FOUND),
)
async def suspend_schedule(reference: str, caller: JobsWriter, services: ServicesDep) -> Response:
    change = ScheduleUpdate(suspended=True)
    return answer_version(await services.call(services.resources.schedules.edit, caller.tenant_id, reference, change))


@router.post(
    "/{reference}/resume",
    response_model=ScheduleView,
    summary="Resume a schedule from the next due time on",
    responses=documented(ErrorCode.NOT_FOUND),
)
async def resume_schedule(reference: str, caller: JobsWriter, services: ServicesDep) -> Response:
    change = ScheduleUpdate(suspended=False)
    return answer_version(await services.call(services.resources.schedules.edit, caller.tenant_id, reference, change))


@router.post(
    "/{reference}/trigger",
    status_code=201,
    response_model=ScheduleRunView,
    summary="Fire now, also while suspended",
    description="The job appears in the run within a few seconds. `overlap` applies, `only_if_changed` does not.",
    responses=documented(ErrorCode.NOT_FOUND),
)
async def trigger_schedule(reference: str, caller: JobsWriter, services: ServicesDep) -> Response:
    return answer(await services.call(services.resources.schedules.trigger, caller.tenant_id, reference), status=201)


@router.get(
    "/{reference}/runs",
    response_model=Page[ScheduleRunView],
    summary="List a schedule's fires and their outcomes, newest first",
    responses=documented(ErrorCode.NOT_FOUND),
)
async def list_runs(
    reference: str, caller: JobsReader, services: ServicesDep, cursor: Cursor = None, limit: Limit = 50
) -> Response:
    items, following = await services.call(
        services.resources.schedules.store.runs, caller.tenant_id, reference, cursor=cursor, limit=limit
    )
    return answer(Page[ScheduleRunView](items=items, next_cursor=following))


async def _with_costs(services: Services, schedules: Sequence[ScheduleView]) -> list[ScheduleView]:
    """The schedules with what their runs have cost."""
    ledger = services.resources.costs
    costs = await services.call(ledger.of_schedules, [schedule.id for schedule in schedules])
    if costs is None:
        return list(schedules)
    return [
        schedule.model_copy(update={"cost": CostView(amount=costs[schedule.id], currency=ledger.prices.currency)})
        for schedule in schedules
    ]
