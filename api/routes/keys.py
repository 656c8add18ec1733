"""API keys: of the caller's tenant, and for administrators of any tenant."""

from typing import Annotated

from fastapi import APIRouter, Body, Query
from starlette.responses import Response

from nightpress.api.deps import Cursor, KeysReader, KeysWriter, Limit, ServicesDep
from nightpress.api.once import OnceRoute
from nightpress.api.problems import documented
from nightpress.api.routes import answer
from nightpress.core.errors import ErrorCode
from nightpress.core.wire.access import KeyCreate, KeyRotate, KeyView, NewKeyView, TenantId
from nightpress.core.wire.base import Page

router = APIRouter(prefix="/v1/keys", tags=["access"], route_class=OnceRoute)

_EXAMPLES = {
    "for a pipeline": {
        "summary": "A key that submits jobs and fetches results, for a year",
        "value": {
            "name": "nightly-ci",
            "scopes": ["jobs:read", "jobs:write", "models:read"],
            "expires_at": "2027-11-24T00:00:00Z",
        },
    }
}


@router.get("", response_model=Page[KeyView], summary="List keys", responses=documented(ErrorCode.FORBIDDEN))
async def list_keys(
    caller: KeysReader,
    services: ServicesDep,
    tenant_id: Annotated[TenantId | None, Query(description="Another tenant, for administrators.")] = None,
    cursor: Cursor = None,
    limit: Limit = 50,
) -> Response:
    items, following = await services.call(
        services.resources.issuer.page, caller, tenant_id=tenant_id, cursor=cursor, limit=limit
    )
    return answer(Page[KeyView](items=items, next_cursor=following))


@router.post(
    "",
    status_code=201,
    response_model=NewKeyView,
    summary="Make a key; only this answer shows it",
    responses=documented(ErrorCode.INVALID_REQUEST),
)
async def create_key(
    caller: KeysWriter, services: ServicesDep, body: Annotated[KeyCreate, Body(openapi_examples=_EXAMPLES)]
) -> Response:
    made = await services.call(services.resources.issuer.create, caller, body)
    return answer(made, status=201, headers={"Location": f"/v1/keys/{made.record.id}", **_NO_STORE})


@router.get(
    "/{key_id}",
    response_model=KeyView,
    summary="Get a key, without its secret",
    responses=documented(ErrorCode.NOT_FOUND),
)
async def get_key(key_id: str, caller: KeysReader, services: ServicesDep) -> Response:
    return answer(await services.call(services.resources.issuer.get, caller, key_id))


@router.post(
    "/{key_id}/rotate",
    status_code=201,
    response_model=NewKeyView,
    summary="Replace a key; the old key keeps working for a while",
    responses=documented(ErrorCode.NOT_FOUND, ErrorCode.CONFLICT, ErrorCode.INVALID_REQUEST),
)
async def rotate_key(key_id: str, caller: KeysWriter, services: ServicesDep, body: KeyRotate | None = None) -> Response:
    overlap_s = (body or KeyRotate()).overlap_s
    made = await services.call(services.resources.issuer.rotate, caller, key_id, overlap_s=overlap_s)
    return answer(made, status=201, headers={"Location": f"/v1/keys/{made.record.id}", **_NO_STORE})


@router.delete(
    "/{key_id}",
    status_code=204,
    response_class=Response,
    summary="Revoke a key",
    responses=documented(ErrorCode.NOT_FOUND),
)
async def revoke_key(key_id: str, caller: KeysWriter, services: ServicesDep) -> Response:
    await services.call(services.resources.issuer.revoke, caller, key_id)
    return Response(status_code=204)


_NO_STORE = {"Cache-Control": "no-store"}
