"""Studies: searches for the best form of a model that keeps some gates."""

from typing import Annotated

from fastapi import APIRouter, Body, Request
from starlette.responses import Response

from nightpress.api import sse
from nightpress.api.deps import Cursor, JobsReader, JobsWriter, Limit, ServicesDep
from nightpress.api.once import OnceRoute
from nightpress.api.problems import documented
from nightpress.api.routes import answer
from nightpress.api.routes.lines import After, Lines, documented_lines, page_or_stream
from nightpress.core.errors import ErrorCode
from nightpress.core.wire.base import Page
from nightpress.core.wire.jobs import EventView
from nightpress.core.wire.studies import StudyCreate, StudyReport, StudyView, TrialView
from nightpress.core.wire.trackers import TrackedView

router = APIRouter(prefix="/v1/studies", tags=["studies"], route_class=OnceRoute)

_EXAMPLES = {
    "smallest": {
        "summary": "The smallest form that loses at most 1% of perplexity",
        "value": {"model": "smollm2-135m", "minimize": "size", "gates": {"perplexity": "<= +1%"}, "trials": 24},
    },
    "own space": {
        "summary": "A space of one's own: some bits, group sizes and exports",
        "value": {
            "model": "all-minilm-l6-v2",
            "minimize": "latency",
            "gates": {"cosine": ">= 0.99"},
            "space": [
                {
                    "name": "static",
                    "passes": [
                        {"choice": [None, {"pass": "channels", "share": {"range": [0.05, 0.4]}}]},
                        {"pass": "static-int8", "min_cosine": {"choice": [0.99, 0.995, 0.999]}},
                    ],
                    "exports": [{"choice": ["onnx", "openvino"]}],
                }
            ],
        },
    },
}
_REFUSALS = (
    ErrorCode.INVALID_REQUEST,
    ErrorCode.INVALID_RECIPE,
    ErrorCode.INVALID_DATA,
    ErrorCode.UNSUPPORTED_ARCHITECTURE,
    ErrorCode.CANNOT_FIT,
    ErrorCode.NOT_FOUND,
    ErrorCode.CONFLICT,
    ErrorCode.QUOTA_EXCEEDED,
)


@router.post(
    "",
    status_code=201,
    response_model=StudyView,
    summary="Begin a study",
    description="The control process begins its trials within seconds. Each is a job with `study_id`.",
    responses=documented(*_REFUSALS),
)
async def create_study(
    caller: JobsWriter, services: ServicesDep, body: Annotated[StudyCreate, Body(openapi_examples=_EXAMPLES)]
) -> Response:
    study = await services.parse(services.resources.studies.create, caller.tenant_id, body, key_id=caller.key_id)
    return answer(study, status=201, headers={"Location": f"/v1/studies/{study.id}"})


@router.get("", response_model=Page[StudyView], summary="List studies, newest first")
async def list_studies(caller: JobsReader, services: ServicesDep, cursor: Cursor = None, limit: Limit = 50) -> Response:
    items, following = await services.call(
        services.resources.studies.store.page, caller.tenant_id, cursor=cursor, limit=limit
    )
    return answer(Page[StudyView](items=items, next_cursor=following))


@router.get("/{study_id}", response_model=StudyView, summary="Get a study", responses=documented(ErrorCode.NOT_FOUND))
async def get_study(study_id: str, caller: JobsReader, services: ServicesDep) -> Response:
    return answer(await services.call(services.resources.studies.store.get, caller.tenant_id, study_id))


@router.post(
    "/{study_id}/cancel",
    response_model=StudyView,
    summary="Cancel a study and its trials",
    description="It is `cancelling` until the workers have stopped. A study that has ended stays as it is.",
    responses=documented(ErrorCode.NOT_FOUND),
)
async def cancel_study(study_id: str, caller: JobsWriter, services: ServicesDep) -> Response:
    return answer(await services.call(services.resources.studies.cancel, caller.tenant_id, study_id))


@router.get(
    "/{study_id}/trials",
    response_model=Page[TrialView],
    summary="List a study's trials, in the order in which they were proposed",
    responses=documented(ErrorCode.NOT_FOUND, ErrorCode.INVALID_REQUEST),
)
async def list_trials(
    study_id: str, caller: JobsReader, services: ServicesDep, cursor: Cursor = None, limit: Limit = 50
) -> Response:
    items, following = await services.call(
        services.resources.studies.store.trials, caller.tenant_id, study_id, cursor=cursor, limit=limit
    )
    return answer(Page[TrialView](items=items, next_cursor=following))


@router.get(
    "/{study_id}/report",
    response_model=StudyReport,
    summary="Get a study's report",
    description="A study has a report when it has succeeded.",
    responses=documented(ErrorCode.NOT_FOUND),
)
async def get_study_report(study_id: str, caller: JobsReader, services: ServicesDep) -> Response:
    return answer(await services.call(services.resources.studies.store.report, caller.tenant_id, study_id))


@router.get(
    "/{study_id}/trackers",
    response_model=Page[TrackedView],
    summary="List a study's runs in trackers, e.g. MLflow",
    responses=documented(ErrorCode.NOT_FOUND),
)
async def study_trackers(study_id: str, caller: JobsReader, services: ServicesDep) -> Response:
    await services.call(services.resources.studies.store.get, caller.tenant_id, study_id)
    return answer(Page[TrackedView](items=await services.call(services.resources.trackers.of, study_id)))


@router.get(
    "/{study_id}/events",
    response_model=Page[EventView],
    summary="List or follow a study's events",
    responses=documented_lines("study"),
)
async def study_events(
    request: Request,
    study_id: str,
    caller: JobsReader,
    services: ServicesDep,
    after: After = 0,
    limit: Lines = 500,
) -> Response:
    store = services.resources.studies.store
    study = await services.call(store.get, caller.tenant_id, study_id)
    return await page_or_stream(request, services, study, sse.EVENTS, store.events, after=after, limit=limit)
