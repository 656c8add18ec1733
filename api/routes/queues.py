"""The queues: how many jobs wait and run, and since when."""

from fastapi import APIRouter
from starlette.responses import Response

from nightpress.api.deps import ServicesDep, WorkersReader
from nightpress.api.routes import answer
from nightpress.core.wire.base import Page
from nightpress.core.wire.system import QueueView

router = APIRouter(prefix="/v1/queues", tags=["workers"])


@router.get(
    "", response_model=Page[QueueView], summary="Count the jobs that wait and run in each queue, over all tenants"
)
async def list_queues(_caller: WorkersReader, services: ServicesDep) -> Response:
    found = await services.call(services.resources.store.reader.queues)
    return answer(Page[QueueView](items=[QueueView.model_validate(queue, from_attributes=True) for queue in found]))
