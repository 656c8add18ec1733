"""Workers, queues and the service itself on the wire."""

import datetime as dt
from typing import Literal

from pydantic import (
    Field,
)

from nightpress.core.wire.access import PersonView, UsageView
from nightpress.core.wire.base import View


class GpuView(View):
    """A GPU, or an instance of a divided GPU (MIG), that a worker offers."""

    uuid: str
    name: str
    memory: int
    memory_used: int | None = None  #: as of the last beat, by whoever uses it
    held: bool = Field(False, description="Whether a job holds it.")
    job_id: str | None = Field(None, description="The job that holds it, if the caller may see it.")


class WorkerView(View):
    id: str
    host: str
    queue: Literal["cpu", "gpu"]
    device: str
    memory: int
    gpu_memory: int | None = None  #: of its largest GPU
    gpu_memory_used: int | None = None  #: of that GPU, as of the last beat, by whoever uses it
    gpus: list[GpuView] = Field([], description="The GPUs that it offers. A job holds as many of them as it needs.")
    cpu_jobs: int = Field(0, description="Jobs of the queue `cpu` that it runs beside those of the queue `gpu`.")
    threads: int  #: of a job on one GPU
    vllm: bool = Field(False, description="Whether its jobs also run artifacts for vLLM in vLLM.")
    version: str
    state: Literal["idle", "busy", "draining", "unfit", "lost"]
    unfit: str | None = Field(
        None, description="What is wrong with its machine. Until that is mended it claims no jobs."
    )
    job_id: str | None = Field(description="The first of `job_ids`.")
    job_ids: list[str] = Field([], description="Its running jobs; of other tenants, only an administrator sees them.")
    started_at: dt.datetime
    last_seen_at: dt.datetime


class QueueView(View):
    """The queued and running jobs of a queue, over all tenants."""

    name: Literal["cpu", "gpu"]
    queued: int
    running: int
    oldest_queued_s: float | None  #: age of the oldest job that could run now
    queued_gpus: int = 0  #: GPUs that the queued jobs need
    running_gpus: int = 0  #: GPUs that the running jobs hold


class MeView(View):
    """The caller's key, its tenant and its rights. `person`: of a caller who signed in by OIDC; `key_id` is then the person's id."""

    tenant_id: str
    key_id: str
    person: PersonView | None = None
    scopes: list[str]
    quotas: dict[str, int] = {}  #: 0: no bound
    usage: UsageView | None = None


class ReadyView(View):
    """`ok`, or `degraded`: jobs are accepted, but a part that they need later doesn't answer."""

    status: Literal["ok", "degraded", "unavailable"]
    checks: dict[str, str]
    version: str
