"""The records that the job store takes and returns."""

import datetime as dt
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from nightpress.core.handoff.manifest import Manifest
from nightpress.core.recipes.placement import Queue
from nightpress.core.wire.jobs import JobState

WorkerState = Literal["idle", "busy", "draining", "unfit", "lost"]


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job to submit: everything is resolved and checked; the store only writes it."""

    tenant_id: str
    model_id: str
    model_name: str
    model_digest: str
    recipe: dict[str, Any]  #: normalised
    queue: Queue
    needs_memory: int  #: bytes, from the plan's estimate; only a worker that offers as much may claim
    run_limit_s: float
    stall_s: float
    max_failures: int
    needs_gpu_memory: int = 0  #: bytes of a GPU's memory, likewise
    queue_reason: str = ""  #: why this queue
    name: str = ""
    priority: int = 0
    labels: dict[str, str] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)  #: how the recipe names a data set → {id, name, digest}
    run_after: dt.datetime | None = None  #: None: at once
    queue_limit_s: float | None = None
    retry_of: str | None = None
    promote: bool = True  #: an accepted result becomes the model name's latest
    created_by: str | None = None  #: the key's id
    fingerprint: str | None = None  #: of all that decides the result; jobs of one tenant with the same may share it
    traceparent: str | None = None  #: of the span that submitted it, in W3C's form


@dataclass(frozen=True, slots=True)
class Idempotency:
    """A client's key and a digest of what it asked for. The same pair gives the same job."""

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
    model_id: str
    model_name: str
    model_digest: str
    recipe: dict[str, Any]
    data: dict[str, Any]
    fingerprint: str | None  #: of all that decides its result
    attempt: int  #: how often it was claimed; the number of the current or last attempt
    failures: int
    max_failures: int
    error: dict[str, Any] | None  #: NightpressError.as_dict(), exactly in state failed
    retry_of: str | None
    promote: bool
    created_by: str | None
    traceparent: str | None
    reused_from: str | None  #: the job whose result this one was given
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

    def told(self) -> dict[str, Any]:
        """What a webhook's receiver reads of it."""
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
class WorkerOffer:
    """What a worker can hold now."""

    worker_id: str
    queue: Queue
    device: str
    memory: int
    threads: int
    gpu_memory: int | None = None  #: bytes; None: no GPU, or one that does not say
    gpu_uuid: str | None = None


@dataclass(frozen=True, slots=True)
class Lease:
    """A worker's right to one attempt of a job. Whoever lost it can write nothing more."""

    job_id: str
    lease_id: str
    attempt: int
    worker_id: str


class Claimed(NamedTuple):
    job: Job
    lease: Lease


class Renewal(NamedTuple):
    held: bool
    cancel_requested: bool


@dataclass(frozen=True, slots=True)
class MetricRow:
    """One measured figure, kept in SQL so that jobs can be compared without opening their reports."""

    subject: str  #: "source", or an artifact's name
    name: str
    value: float
    unit: str = ""
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Succeeded:
    """What a worker hands in when all artifacts are shipped and verified."""

    verdict: Literal["accepted", "rejected"]
    manifest: Manifest
    report: dict[str, Any]
    metrics: list[MetricRow] = field(default_factory=list)
    packages: tuple[str, ...] = ()  #: name and version of each whose passes made it


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
    path: str  #: folder below the attempt's prefix
    size: int
    digest: str
    consumer: str
    files: list[dict[str, Any]]  #: path (below `path`), size, sha256


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker as it announces itself; state, job and times are filled in on the way out."""

    id: str
    host: str
    queue: Queue
    device: str
    memory: int
    threads: int
    version: str
    draining: bool = False
    unfit: str | None = None  #: what is wrong with its machine, for which it claims nothing
    gpu_memory: int | None = None  #: bytes; None where there is no GPU
    gpu_memory_used: int | None = None  #: by whoever uses it, as of the last beat
    state: WorkerState = "idle"
    job_id: str | None = None
    started_at: dt.datetime | None = None
    last_seen_at: dt.datetime | None = None


@dataclass(frozen=True, slots=True)
class QueueLoad:
    """What waits in a queue and what runs from it, over all tenants."""

    name: Queue
    queued: int
    running: int
    oldest_queued_s: float | None  #: age of the oldest job that could run now


@dataclass(frozen=True, slots=True)
class JobStatistics:
    """For /metrics."""

    jobs: dict[tuple[Queue, JobState], int]
    oldest_queued_s: dict[Queue, float]  #: age of the oldest job that could run now
    failures: dict[str, int]  #: failed jobs by error code
