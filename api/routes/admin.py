"""For administrators: tenants, their quotas and use, and the audit log."""

from typing import Annotated

from fastapi import APIRouter, Path, Query
from starlette.responses import Response

from nightpress.api.deps import Admin, Cursor, Limit, ServicesDep
from nightpress.api.problems import documented
from nightpress.api.routes import answer
from nightpress.api.versions import IfMatch, answer_version, version_of
from nightpress.core.errors import ErrorCode
from nightpress.core.wire.access import AuditView, QuotaChange, TenantId, TenantView
from nightpress.core.wire.base import Page

router = APIRouter(prefix="/v1/admin", tags=["administration"])

Tenant = Annotated[TenantId, Path()]


@router.get("/tenants", response_model=Page[TenantView], summary="List tenants with their quotas and use")
async def list_tenants(_caller: Admin, services: ServicesDep, cursor: Cursor = None, limit: Limit = 50) -> Response:
    items, following = await services.call(services.resources.quotas.page, cursor=cursor, limit=limit)
    return answer(Page[TenantView](items=items, next_cursor=following))


@router.get(
    "/tenants/{tenant_id}",
    response_model=TenantView,
    summary="Get a tenant",
    responses=documented(ErrorCode.NOT_FOUND, ErrorCode.INVALID_REQUEST),
)
async def get_tenant(tenant_id: Tenant, _caller: Admin, services: ServicesDep) -> Response:
    return answer_version(await services.call(services.resources.quotas.view, tenant_id))


@router.patch(
    "/tenants/{tenant_id}",
    response_model=TenantView,
    summary="Set a tenant's quotas",
    description="Quotas that are not given stay as they are; null restores the installation's default. Other processes follow within five seconds.",
    responses=documented(ErrorCode.INVALID_REQUEST, ErrorCode.PRECONDITION_FAILED),
)
async def change_tenant(
    tenant_id: Tenant, _caller: Admin, services: ServicesDep, body: QuotaChange, if_match: IfMatch = None
) -> Response:
    return answer_version(
        await services.call(services.resources.quotas.change, tenant_id, body, version=version_of(if_match))
    )


@router.get("/audit", response_model=Page[AuditView], summary="List what keys have changed, newest first")
async def list_audit(
    _caller: Admin,
    services: ServicesDep,
    tenant_id: Annotated[TenantId | None, Query(description="Only this tenant's entries.")] = None,
    cursor: Cursor = None,
    limit: Limit = 50,
) -> Response:
    items, following = await services.call(
        services.resources.audit.page, tenant_id=tenant_id, cursor=cursor, limit=limit
    )
    return answer(Page[AuditView](items=items, next_cursor=following))
