"""The records that the job store takes and returns."""

import datetime as dt
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from nightpress.core.handoff.manifest import Manifest
from nightpress.core.recipes.placement import Queue
from nightpress.core.wire.jobs import JobState

WorkerState = Literal["idle", "busy", "draining", "unfit", "lost"]
#: Added to `needs_gpu_memory` of a job whose recipe says `gpus`. A worker from before that field reads it as bytes, which no GPU has, and
#: so never claims the job.
NOT_FOR_OLD_WORKERS = 2**62


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job to submit. All names are resolved and checked already; the store only writes the row."""

    tenant_id: str
    model_id: str
    model_name: str
    model_digest: str
    recipe: dict[str, Any]  #: the recipe's normalised form
    queue: Queue
    needs_memory: int  #: bytes, from the plan's estimate; only a worker that offers at least as much may claim the job
    run_limit_s: float
    stall_s: float
    max_failures: int
    needs_gpu_memory: int = 0  #: bytes of each GPU, with the same rule; may contain NOT_FOR_OLD_WORKERS
    needs_gpus: int = 1  #: GPUs of one host, if the queue is `gpu`
    queue_reason: str = ""  #: why the plan chose this queue
    name: str = ""
    priority: int = 0
    labels: dict[str, str] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)  #: the name of a data set in the recipe → {id, name, digest}
    run_after: dt.datetime | None = None  #: None: at once
    queue_limit_s: float | None = None
    retry_of: str | None = None
    promote: bool = True  #: if accepted, the result becomes the latest of the model's name
    created_by: str | None = None  #: the key's id
    #: digest of all that decides the result; jobs of one tenant with the same fingerprint may share a result
    fingerprint: str | None = None
    traceparent: str | None = None  #: the span that submitted the job, as a W3C `traceparent`
    study_id: str | None = None  #: the study that the job is a trial of
    destinations: list[str] = field(default_factory=list)  #: addresses that an accepted result is delivered to


@dataclass(frozen=True, slots=True)
class Idempotency:
    """A client's idempotency key and a digest of its request. The same pair returns the same job."""

    key: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Job:
    """One row of `jobs`. Each field is a column of the same name."""

    id: str
    tenant_id: str
    name: str
    state: JobState
    verdict: Literal["accepted", "rejected"] | None
    phase: str | None
    progress: float
    pass_index: int | None
    eta_s: float | None
    message: str
    priority: int
    labels: dict[str, str]
    queue: Queue
    queue_reason: str
    needs_memory: int
    needs_gpu_memory: int
    needs_gpus: int
    model_id: str
    model_name: str
    model_digest: str
    recipe: dict[str, Any]
    data: dict[str, Any]
    fingerprint: str | None  #: digest of all that decides the result
    attempt: int  #: number of times it was claimed: the number of the current or last attempt
    failures: int
    max_failures: int
    error: dict[str, Any] | None  #: NightpressError.as_dict(); set if and only if the state is failed
    retry_of: str | None
    promote: bool
    created_by: str | None
    traceparent: str | None
    study_id: str | None  #: the study that the job is a trial of
    destinations: list[str]  #: addresses that an accepted result is delivered to
    reused_from: str | None  #: the job whose result this job shares
    worker_id: str | None  #: the current or last worker
    lease_id: str | None
    lease_expires_at: dt.datetime | None
    queue_limit_s: float | None
    run_limit_s: float
    stall_s: float
    created_at: dt.datetime
    run_after: dt.datetime
    started_at: dt.datetime | None  #: of the current or last attempt
    progressed_at: dt.datetime | None
    finished_at: dt.datetime | None

    @property
    def gpus(self) -> int:
        """The GPUs that it holds while it runs; 0 on the queue `cpu`."""
        return self.needs_gpus if self.queue == "gpu" else 0

    @property
    def gpu_bytes(self) -> int:
        """The bytes of memory that each of its GPUs must have."""
        return self.needs_gpu_memory % NOT_FOR_OLD_WORKERS

    def told(self) -> dict[str, Any]:
        """The fields that a webhook's receiver gets."""
        return {
            "id": self.id,
            "name": self.name,
            "state": self.state,
            "verdict": self.verdict,
            "model_id": self.model_id,
            "model_name": self.model_name,
            "recipe": self.recipe.get("name"),
            "labels": self.labels,
            "attempt": self.attempt,
            "error": self.error,
        }


@dataclass(frozen=True, slots=True)
class OfferedGpu:
    """A GPU, or an instance of a divided GPU, that jobs may use."""

    uuid: str  #: `GPU-…` or `MIG-…`
    name: str
    memory: int  #: bytes

    @property
    def whole(self) -> bool:
        """Whether it may be one of several GPUs of a job: instances of divided GPUs can't work together."""
        return not self.uuid.startswith("MIG-")


@dataclass(frozen=True, slots=True)
class WorkerOffer:
    """The resources of a host that a worker offers to jobs. Memory in bytes.

    On the queue `gpu`, as many jobs run at a time as there are free GPUs and memory for them, and `cpu_jobs` jobs of the queue `cpu` beside
    them. On the queue `cpu`, one job has the whole host.
    """

    worker_id: str
    queue: Queue
    device: str
    memory: int
    threads: int
    gpus: tuple[OfferedGpu, ...] = ()
    cpu_jobs: int = 0

    @property
    def shares(self) -> int:
        """The most jobs that run at a time. Each has a share of the memory and threads; a job of several GPUs has several."""
        return 1 if self.queue == "cpu" else len(self.gpus) + self.cpu_jobs

    @property
    def queues(self) -> tuple[Queue, ...]:
        """The queues that it takes jobs from, in this order."""
        return (self.queue, "cpu") if self.cpu_jobs else (self.queue,)

    def threads_of(self, shares: int) -> int:
        """The CPU threads of a job with so many shares."""
        return max(1, self.threads * shares // max(1, self.shares))


@dataclass(frozen=True, slots=True)
class Share:
    """The part of a host that one attempt has."""

    memory: int  #: bytes
    threads: int
    gpus: tuple[OfferedGpu, ...] = ()

    @property
    def size(self) -> int:
        """How many of its worker's `shares` it is."""
        return max(1, len(self.gpus))


@dataclass(frozen=True, slots=True)
class Lease:
    """A worker's right to one attempt of a job. A worker that lost the lease can write nothing more."""

    job_id: str
    lease_id: str
    attempt: int
    worker_id: str


class Claimed(NamedTuple):
    job: Job
    lease: Lease
    share: Share


class Renewal(NamedTuple):
    held: bool
    cancel_requested: bool


@dataclass(frozen=True, slots=True)
class MetricRow:
    """One measured value. It is kept in SQL so that jobs can be compared without reading their reports."""

    subject: str  #: "source", or an artifact's name
    name: str
    value: float
    unit: str = ""
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Succeeded:
    """The result that a worker commits after all artifacts are uploaded and verified."""

    verdict: Literal["accepted", "rejected"]
    manifest: Manifest
    report: dict[str, Any]
    metrics: list[MetricRow] = field(default_factory=list)
    packages: tuple[str, ...] = ()  #: name and version of each package whose passes were used


@dataclass(frozen=True, slots=True)
class Event:
    seq: int
    at: dt.datetime
    kind: str
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class LogLine:
    seq: int
    at: dt.datetime
    attempt: int
    level: str
    text: str


@dataclass(frozen=True, slots=True)
class Artifact:
    id: str
    job_id: str
    attempt: int
    format: str
    path: str  #: folder, relative to the attempt's prefix
    size: int
    digest: str
    consumer: str
    files: list[dict[str, Any]]  #: path (relative to `path`), size in bytes, sha256


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker as it announces itself. State, jobs and times are filled in when the roster is read."""

    id: str
    host: str
    queue: Queue
    device: str
    memory: int
    threads: int
    version: str
    draining: bool = False
    unfit: str | None = None  #: the fault of its machine; while there is one, the worker claims no jobs
    gpu_memory: int | None = None  #: bytes of its largest GPU; None if there is no GPU
    gpu_memory_used: int | None = None  #: bytes of that GPU used by all processes, at the last heartbeat
    gpus: list[dict[str, Any]] | None = None  #: uuid, name, memory and memory_used of each GPU; when read, also job_id
    gpu_kinds: list[list[int]] | None = None  #: [memory, count] of each kind: the most GPUs of it that one job can have
    cpu_jobs: int = 0  #: jobs of the queue `cpu` that run beside those of the queue `gpu`
    vllm: bool = False  #: whether its jobs also run artifacts in vLLM
    state: WorkerState = "idle"
    job_ids: list[str] = field(default_factory=list)  #: the jobs that it runs
    started_at: dt.datetime | None = None
    last_seen_at: dt.datetime | None = None


@dataclass(frozen=True, slots=True)
class QueueLoad:
    """The number of queued and running jobs of a queue, over all tenants."""

    name: Queue
    queued: int
    running: int
    oldest_queued_s: float | None  #: age of the oldest job that could run now
    queued_gpus: int = 0  #: GPUs that the queued jobs need
    running_gpus: int = 0  #: GPUs that the running jobs hold


@dataclass(frozen=True, slots=True)
class JobStatistics:
    """Counts of jobs for /metrics."""

    jobs: dict[tuple[Queue, JobState], int]
    oldest_queued_s: dict[Queue, float]  #: age of the oldest job that could run now
    failures: dict[str, int]  #: failed jobs by error code
    gpus: dict[JobState, int] = field(default_factory=dict)  #: GPUs of the jobs of the queue `gpu` that have not ended
