"""Who am I?"""

from typing import Annotated

from fastapi import APIRouter, Depends
from starlette.responses import Response

from api.deps import authenticated
from api.routes import answer
from core.access.keys import Principal
from core.schemas import MeView

router = APIRouter(prefix="/v1/me", tags=["access"])


@router.get("", response_model=MeView, summary="The key's tenant and scopes")
async def me(caller: Annotated[Principal, Depends(authenticated)]) -> Response:
    return answer(MeView(tenant_id=caller.tenant_id, key_id=caller.key_id, scopes=sorted(caller.scopes)))
