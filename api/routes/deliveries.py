"""Deliveries of accepted results to buckets, repositories of the Hub and OCI registries."""

from typing import Annotated

from fastapi import APIRouter, Body, Query
from starlette.responses import Response

from nightpress.api.deps import Cursor, DeliveriesReader, DeliveriesWriter, Limit, ServicesDep
from nightpress.api.once import OnceRoute
from nightpress.api.problems import documented
from nightpress.api.routes import answer
from nightpress.core.errors import ErrorCode
from nightpress.core.wire.base import Page
from nightpress.core.wire.deliveries import DeliveryCreate, DeliveryState, ResultDeliveryView

router = APIRouter(prefix="/v1/deliveries", tags=["deliveries"], route_class=OnceRoute)

_EXAMPLES = {
    "a bucket": {
        "summary": "A folder of a bucket",
        "value": {"job_id": "job_01jd3q5q8f4x5v7r9w2e6t8y0z", "destinations": ["s3://models/{model}/{job}"]},
    },
    "the Hub": {
        "summary": "A repository of the Hub, and a registry",
        "value": {
            "job_id": "job_01jd3q5q8f4x5v7r9w2e6t8y0z",
            "destinations": ["hf://acme/encoder-int8@main", "oci://registry.example.com/acme/encoder:nightly"],
        },
    },
}


@router.post(
    "",
    status_code=201,
    response_model=Page[ResultDeliveryView],
    summary="Deliver the result of an accepted job",
    responses=documented(
        ErrorCode.INVALID_REQUEST, ErrorCode.NOT_FOUND, ErrorCode.CONFLICT, ErrorCode.PATH_NOT_ALLOWED
    ),
)
async def deliver_result(
    caller: DeliveriesWriter, services: ServicesDep, body: Annotated[DeliveryCreate, Body(openapi_examples=_EXAMPLES)]
) -> Response:
    made = await services.call(
        services.resources.deliveries.add, caller.tenant_id, body.job_id, body.destinations, key_id=caller.key_id
    )
    return answer(Page[ResultDeliveryView](items=made), status=201)


@router.get("", response_model=Page[ResultDeliveryView], summary="List deliveries, newest first")
async def list_result_deliveries(
    caller: DeliveriesReader,
    services: ServicesDep,
    job: Annotated[str | None, Query(max_length=40, description="Only of this job.")] = None,
    state: Annotated[DeliveryState | None, Query(description="Only in this state.")] = None,
    cursor: Cursor = None,
    limit: Limit = 50,
) -> Response:
    items, following = await services.call(
        services.resources.deliveries.page, caller.tenant_id, job_id=job, state=state, cursor=cursor, limit=limit
    )
    return answer(Page[ResultDeliveryView](items=items, next_cursor=following))


@router.get(
    "/{result_delivery_id}",
    response_model=ResultDeliveryView,
    summary="Get a delivery with every try",
    responses=documented(ErrorCode.NOT_FOUND),
)
async def get_result_delivery(result_delivery_id: str, caller: DeliveriesReader, services: ServicesDep) -> Response:
    return answer(await services.call(services.resources.deliveries.get, caller.tenant_id, result_delivery_id))


@router.post(
    "/{result_delivery_id}/cancel",
    response_model=ResultDeliveryView,
    summary="Cancel a delivery; an attempt that is under way ends within seconds",
    responses=documented(ErrorCode.NOT_FOUND),
)
async def cancel_delivery(result_delivery_id: str, caller: DeliveriesWriter, services: ServicesDep) -> Response:
    return answer(await services.call(services.resources.deliveries.cancel, caller.tenant_id, result_delivery_id))


@router.post(
    "/{result_delivery_id}/retry",
    response_model=ResultDeliveryView,
    summary="Try a failed or cancelled delivery again, or a pending one now",
    responses=documented(ErrorCode.NOT_FOUND, ErrorCode.CONFLICT),
)
async def retry_delivery(result_delivery_id: str, caller: DeliveriesWriter, services: ServicesDep) -> Response:
    return answer(await services.call(services.resources.deliveries.retry, caller.tenant_id, result_delivery_id))
