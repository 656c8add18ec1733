"""Webhooks: messages to an address, a channel or a mailbox when something has happened."""

from typing import Annotated

from fastapi import APIRouter, Body
from starlette.responses import Response

from nightpress.api.deps import Cursor, Limit, ServicesDep, WebhooksReader, WebhooksWriter
from nightpress.api.once import OnceRoute
from nightpress.api.problems import documented
from nightpress.api.routes import answer
from nightpress.api.versions import IfMatch, answer_version, version_of
from nightpress.core.errors import ErrorCode
from nightpress.core.wire.base import Page
from nightpress.core.wire.webhooks import (
    DeliveryView,
    NewWebhookView,
    SecretRotate,
    WebhookCreate,
    WebhookUpdate,
    WebhookView,
)

router = APIRouter(prefix="/v1/webhooks", tags=["webhooks"], route_class=OnceRoute)

_EXAMPLES = {
    "ended jobs": {
        "summary": "Every job that ends",
        "value": {
            "url": "https://ci.example.com/hooks/nightpress",
            "events": ["job.succeeded", "job.failed", "job.cancelled"],
        },
    },
    "a channel": {
        "summary": "A channel of Slack is told of new results",
        "value": {
            "url": "https://hooks.slack.com/services/T000/B000/XXX",
            "kind": "slack",
            "events": ["model.promoted", "study.succeeded", "schedule.failed"],
        },
    },
    "a mailbox": {
        "summary": "A mailbox is told of what failed, in words of its own",
        "value": {
            "url": "mailto:nights@example.com",
            "kind": "email",
            "events": ["job.failed", "study.failed", "schedule.failed"],
            "template": "$model failed\n$error\n$link",
        },
    },
}
_NO_STORE = {"Cache-Control": "no-store"}


@router.post(
    "",
    status_code=201,
    response_model=NewWebhookView,
    summary="Make a webhook; only this answer shows its secret",
    responses=documented(ErrorCode.INVALID_REQUEST, ErrorCode.URL_NOT_ALLOWED, ErrorCode.QUOTA_EXCEEDED),
)
async def create_webhook(
    caller: WebhooksWriter, services: ServicesDep, body: Annotated[WebhookCreate, Body(openapi_examples=_EXAMPLES)]
) -> Response:
    made = await services.transfer(services.resources.webhooks.create, caller.tenant_id, body, key_id=caller.key_id)
    return answer(made, status=201, headers={"Location": f"/v1/webhooks/{made.webhook.id}", **_NO_STORE})


@router.get("", response_model=Page[WebhookView], summary="List webhooks, newest first")
async def list_webhooks(
    caller: WebhooksReader, services: ServicesDep, cursor: Cursor = None, limit: Limit = 50
) -> Response:
    items, following = await services.call(
        services.resources.webhooks.page, caller.tenant_id, cursor=cursor, limit=limit
    )
    return answer(Page[WebhookView](items=items, next_cursor=following))


@router.get(
    "/{webhook_id}", response_model=WebhookView, summary="Get a webhook", responses=documented(ErrorCode.NOT_FOUND)
)
async def get_webhook(webhook_id: str, caller: WebhooksReader, services: ServicesDep) -> Response:
    return answer_version(await services.call(services.resources.webhooks.get, caller.tenant_id, webhook_id))


@router.patch(
    "/{webhook_id}",
    response_model=WebhookView,
    summary="Change a webhook, or switch it off and on",
    responses=documented(
        ErrorCode.NOT_FOUND, ErrorCode.INVALID_REQUEST, ErrorCode.URL_NOT_ALLOWED, ErrorCode.PRECONDITION_FAILED
    ),
)
async def edit_webhook(
    webhook_id: str, caller: WebhooksWriter, services: ServicesDep, body: WebhookUpdate, if_match: IfMatch = None
) -> Response:
    return answer_version(
        await services.transfer(
            services.resources.webhooks.edit, caller.tenant_id, webhook_id, body, version=version_of(if_match)
        )
    )


@router.delete(
    "/{webhook_id}",
    status_code=204,
    response_class=Response,
    summary="Delete a webhook and its deliveries",
    responses=documented(ErrorCode.NOT_FOUND, ErrorCode.PRECONDITION_FAILED),
)
async def delete_webhook(
    webhook_id: str, caller: WebhooksWriter, services: ServicesDep, if_match: IfMatch = None
) -> Response:
    await services.call(services.resources.webhooks.delete, caller.tenant_id, webhook_id, version=version_of(if_match))
    return Response(status_code=204)


@router.post(
    "/{webhook_id}/rotate",
    response_model=NewWebhookView,
    summary="Make a new secret; for a while messages carry signatures by both secrets",
    responses=documented(ErrorCode.NOT_FOUND, ErrorCode.INVALID_REQUEST, ErrorCode.CONFLICT),
)
async def rotate_secret(
    webhook_id: str, caller: WebhooksWriter, services: ServicesDep, body: SecretRotate | None = None
) -> Response:
    overlap_s = (body or SecretRotate()).overlap_s
    made = await services.call(services.resources.webhooks.rotate, caller.tenant_id, webhook_id, overlap_s=overlap_s)
    return answer(made, headers=_NO_STORE)


@router.post(
    "/{webhook_id}/test",
    status_code=202,
    response_model=DeliveryView,
    summary="Send a test message",
    responses=documented(ErrorCode.NOT_FOUND),
)
async def test_webhook(webhook_id: str, caller: WebhooksWriter, services: ServicesDep) -> Response:
    return answer(await services.call(services.resources.webhooks.test, caller.tenant_id, webhook_id), status=202)


@router.get(
    "/{webhook_id}/deliveries",
    response_model=Page[DeliveryView],
    summary="List the deliveries of a webhook, newest first",
    responses=documented(ErrorCode.NOT_FOUND),
)
async def list_deliveries(
    webhook_id: str, caller: WebhooksReader, services: ServicesDep, cursor: Cursor = None, limit: Limit = 50
) -> Response:
    items, following = await services.call(
        services.resources.webhooks.deliveries, caller.tenant_id, webhook_id, cursor=cursor, limit=limit
    )
    return answer(Page[DeliveryView](items=items, next_cursor=following))


@router.get(
    "/{webhook_id}/deliveries/{delivery_id}",
    response_model=DeliveryView,
    summary="Get a delivery with every try",
    responses=documented(ErrorCode.NOT_FOUND),
)
async def get_delivery(webhook_id: str, delivery_id: str, caller: WebhooksReader, services: ServicesDep) -> Response:
    return answer(await services.call(services.resources.webhooks.delivery, caller.tenant_id, webhook_id, delivery_id))


@router.post(
    "/{webhook_id}/deliveries/{delivery_id}/redeliver",
    status_code=202,
    response_model=DeliveryView,
    summary="Send a message again, with the same webhook-id",
    responses=documented(ErrorCode.NOT_FOUND),
)
async def redeliver(webhook_id: str, delivery_id: str, caller: WebhooksWriter, services: ServicesDep) -> Response:
    sent = await services.call(services.resources.webhooks.redeliver, caller.tenant_id, webhook_id, delivery_id)
    return answer(sent, status=202)
