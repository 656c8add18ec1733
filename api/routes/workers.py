"""The workers and their states."""

from fastapi import APIRouter
from starlette.responses import Response

from nightpress.api.deps import ServicesDep, WorkersReader
from nightpress.api.routes import answer
from nightpress.core.wire.base import Page
from nightpress.core.wire.system import WorkerView

router = APIRouter(prefix="/v1/workers", tags=["workers"])


@router.get("", response_model=Page[WorkerView], summary="List the workers and their states")
async def list_workers(caller: WorkersReader, services: ServicesDep) -> Response:
    found = await services.call(services.resources.store.roster.workers)
    views = []
    for worker in found:
        view = WorkerView.model_validate(worker, from_attributes=True)
        if view.job_id is not None and "admin" not in caller.scopes:
            # A worker serves every tenant. The id of its job is shown only to the tenant of that job.
            own = await services.call(services.resources.store.reader.get, caller.tenant_id, view.job_id)
            view = view if own else view.model_copy(update={"job_id": None})
        views.append(view)
    return answer(Page[WorkerView](items=views))
