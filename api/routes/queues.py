"""What waits, and how long already."""

from fastapi import APIRouter
from starlette.responses import Response

from nightpress.api.deps import ServicesDep, WorkersReader
from nightpress.api.routes import answer
from nightpress.core.wire.base import Page
from nightpress.core.wire.system import QueueView

router = APIRouter(prefix="/v1/queues", tags=["workers"])


@router.get("", response_model=Page[QueueView], summary="The queues: what waits and what runs, over all tenants")
async def list_queues(_caller: WorkersReader, services: ServicesDep) -> Response:
    found = await services.call(services.resources.store.reader.queues)
    return answer(Page[QueueView](items=[QueueView.model_validate(one, from_attributes=True) for one in found]))
