"""The caller: tenant, key, scopes, quotas and use."""

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Depends
from starlette.responses import Response

from nightpress.api.deps import ServicesDep, authenticated
from nightpress.api.routes import answer
from nightpress.core.service.access.keys import Principal
from nightpress.core.wire.access import PersonView
from nightpress.core.wire.system import MeView

router = APIRouter(prefix="/v1/me", tags=["access"])


@router.get("", response_model=MeView, summary="Get the tenant, scopes, quotas and use of the key")
async def me(caller: Annotated[Principal, Depends(authenticated)], services: ServicesDep) -> Response:
    quotas = await services.call(services.resources.quotas.of, caller.tenant_id)
    usage = await services.call(services.resources.quotas.usage, caller.tenant_id)
    person = None if caller.person is None else PersonView(**asdict(caller.person))
    view = MeView(
        tenant_id=caller.tenant_id,
        key_id=caller.key_id,
        person=person,
        scopes=sorted(caller.scopes),
        quotas=asdict(quotas),
        usage=usage,
    )
    return answer(view)
