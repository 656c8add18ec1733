"""The start of most tests of jobs: a model to refer to, a job to submit, a worker that claims it."""

import datetime as dt
from typing import Any

from sqlalchemy import Engine, insert, select, update

from nightpress.core.database import db_now, transaction
from nightpress.core.handoff.manifest import ArtifactEntry, FileEntry, Manifest
from nightpress.core.service.jobs.records import (
    Claimed,
    Job,
    Lease,
    MetricRow,
    NewJob,
    OfferedGpu,
    Succeeded,
    WorkerOffer,
)
from nightpress.core.service.jobs.store import JobStore
from nightpress.core.service.tables.jobs import jobs
from nightpress.core.service.tables.registry import models

MODEL_ID = "model_tiny"
GB = 10**9


def add_model(engine: Engine, model_id: str = MODEL_ID, tenant_id: str = "default") -> None:
    """Insert a model's row with the columns that jobs need."""
    row = {
        "id": model_id,
        "tenant_id": tenant_id,
        "name": "tiny",
        "state": "uploading",
        "source": "upload",
        "size": 0,
        "files": [],
    }
    known = {name: value for name, value in row.items() if name in models.columns}
    with transaction(engine) as connection:
        connection.execute(insert(models).values(**known, created_at=db_now()))


def new_job(**changes: Any) -> NewJob:
    given: dict[str, Any] = {
        "tenant_id": "default",
        "model_id": MODEL_ID,
        "model_name": "tiny",
        "model_digest": "sha256:" + "0" * 64,
        "recipe": {"name": "test", "passes": [{"pass": "magnitude"}], "exports": ["safetensors"]},
        "queue": "cpu",
        "needs_memory": GB,
        "run_limit_s": 3600.0,
        "stall_s": 1800.0,
        "max_failures": 3,
    }
    return NewJob(**(given | changes))


def offer(worker_id: str = "worker-1", **changes: Any) -> WorkerOffer:
    given: dict[str, Any] = {"worker_id": worker_id, "queue": "cpu", "device": "cpu", "memory": 8 * GB, "threads": 2}
    return WorkerOffer(**(given | changes))


def gpus(count: int, memory: int = 80 * GB, name: str = "NVIDIA H100 80GB HBM3") -> tuple[OfferedGpu, ...]:
    """GPUs that a worker offers."""
    return tuple(OfferedGpu(f"GPU-{name.split()[-1]}-{number}", name, memory) for number in range(count))


def host(worker_id: str = "host-1", count: int = 8, **changes: Any) -> WorkerOffer:
    """The offer of a host with GPUs."""
    given = {"queue": "gpu", "device": "NVIDIA H100 80GB HBM3", "memory": 64 * GB, "threads": 16, "gpus": gpus(count)}
    return offer(worker_id, **(given | changes))


def submit(store: JobStore, *, max_queued: int = 10_000, **changes: Any) -> str:
    """Submit a job. Returns its id."""
    return store.submission.submit(new_job(**changes), max_queued=max_queued)[0].id


def claim(store: JobStore, worker_id: str = "worker-1", *, ttl_s: float = 60.0) -> Claimed:
    claimed = store.claims.claim(offer(worker_id), ttl_s=ttl_s)
    assert claimed is not None
    return claimed


def load(store: JobStore, job_id: str) -> Job:
    job = store.reader.get("default", job_id)
    assert job is not None
    return job


def succeeded(lease: Lease, **changes: Any) -> Succeeded:
    """An outcome with one artifact, a report and a metric."""
    file = FileEntry(path="model.safetensors", size=3, sha256="a" * 64)
    artifact = ArtifactEntry(format="safetensors", path="safetensors", files=(file,), consumer="transformers 5")
    report = FileEntry(path="report.json", size=2, sha256="b" * 64)
    manifest = Manifest(
        job_id=lease.job_id, attempt=lease.attempt, verdict="accepted", artifacts=(artifact,), report=(report,)
    )
    given: dict[str, Any] = {
        "verdict": "accepted",
        "manifest": manifest,
        "report": {"schema_version": 1, "verdict": "accepted"},
        "metrics": [MetricRow("source", "perplexity", 24.6, low=24.0, high=25.2)],
    }
    return Succeeded(**(given | changes))


def age(engine: Engine, job_id: str, seconds: float, *columns: str) -> None:
    """Let time pass for one job: move the given timestamp columns into the past."""
    with transaction(engine) as connection:
        row = connection.execute(select(*(jobs.c[name] for name in columns)).where(jobs.c.id == job_id)).one()
        moved = {name: moment - dt.timedelta(seconds=seconds) for name, moment in row._mapping.items()}
        connection.execute(update(jobs).where(jobs.c.id == job_id).values(**moved))
