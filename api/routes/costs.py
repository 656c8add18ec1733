"""What a tenant has spent, day by day."""

from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import Response

from nightpress.api.deps import JobsReader, ServicesDep
from nightpress.api.problems import documented
from nightpress.api.routes import answer
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.wire.access import TenantId
from nightpress.core.wire.costs import SpendingView

router = APIRouter(prefix="/v1/costs", tags=["access"])


@router.get(
    "",
    response_model=SpendingView,
    summary="Get what a tenant has spent, day by day",
    description="Attempts count on the day on which they end (UTC). Days without any are left out.",
    responses=documented(ErrorCode.INVALID_REQUEST, ErrorCode.FORBIDDEN),
)
async def get_spending(
    caller: JobsReader,
    services: ServicesDep,
    days: Annotated[int, Query(ge=1, le=3660, description="Number of days, today included.")] = 31,
    tenant_id: Annotated[TenantId | None, Query(description="Another tenant, for administrators.")] = None,
) -> Response:
    if tenant_id not in {None, caller.tenant_id} and not caller.is_admin:
        raise NightpressError(
            ErrorCode.FORBIDDEN, "Only an administrator's key sees other tenants.", hint="Leave `tenant_id` out."
        )
    ledger = services.resources.costs
    found = await services.call(ledger.by_day, tenant_id or caller.tenant_id, days)
    currency = ledger.prices.currency if ledger.prices else ""
    return answer(SpendingView(currency=currency, days=found))
