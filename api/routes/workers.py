"""The workers and their states."""

from dataclasses import asdict

from fastapi import APIRouter
from starlette.responses import Response

from nightpress.api.deps import ServicesDep, WorkersReader
from nightpress.api.routes import answer
from nightpress.core.service.jobs.records import Worker
from nightpress.core.wire.base import Page
from nightpress.core.wire.system import WorkerView

router = APIRouter(prefix="/v1/workers", tags=["workers"])


@router.get("", response_model=Page[WorkerView], summary="List the workers and their states")
async def list_workers(caller: WorkersReader, services: ServicesDep) -> Response:
    found = await services.call(services.resources.store.roster.workers)
    running = {job_id for worker in found for job_id in worker.job_ids}
    if "admin" not in caller.scopes:
        # A worker serves every tenant. The id of a job is shown only to the tenant of that job.
        jobs = [await services.call(services.resources.store.reader.get, caller.tenant_id, each) for each in running]
        running = {job.id for job in jobs if job is not None}
    return answer(Page[WorkerView](items=[_view(worker, running) for worker in found]))


def _view(worker: Worker, shown: set[str]) -> WorkerView:
    """shown: the jobs whose ids the caller may see."""
    job_ids = [job_id for job_id in worker.job_ids if job_id in shown]
    gpus = [
        {**gpu, "held": gpu["job_id"] is not None, "job_id": gpu["job_id"] if gpu["job_id"] in shown else None}
        for gpu in worker.gpus or ()
    ]
    told = {**asdict(worker), "job_ids": job_ids, "job_id": next(iter(job_ids), None), "gpus": gpus}
    return WorkerView.model_validate(told)
