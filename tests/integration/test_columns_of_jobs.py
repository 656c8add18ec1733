"""Every column of every table of jobs: the code under test writes a different value to each, and the test reads it back.

This shows two columns with exchanged values, two that share a parameter, and a new column that a test lacks.
"""

import datetime as dt
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
from sqlalchemy import Engine, select, update

from nightpress.core.database import db_day, db_now, transaction
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.frames import Progress
from nightpress.core.handoff.manifest import ArtifactEntry, FileEntry, Manifest
from nightpress.core.service.costs.ledger import CostLedger
from nightpress.core.service.costs.prices import PriceList
from nightpress.core.service.jobs.claim_statements import HELD_BACK_S
from nightpress.core.service.jobs.queries import JOB_COLUMNS
from nightpress.core.service.jobs.records import Claimed, Idempotency, Job, MetricRow, NewJob, Succeeded, WorkerOffer
from nightpress.core.service.jobs.store import JobStore
from nightpress.core.service.tables.costs import spending
from nightpress.core.service.tables.jobs import (
    job_artifacts,
    job_attempts,
    job_events,
    job_logs,
    job_metrics,
    job_reports,
    jobs,
)
from nightpress.core.service.tables.promotions import promotions
from nightpress.core.version import ENGINE
from tests.columns import JOB_ALIKE, UNTOUCHED, Chosen, Rows, identifier
from tests.jobs import MODEL_ID, gpus, new_job, submit

COVERED = {
    jobs,
    job_events,
    job_logs,
    job_attempts,
    job_artifacts,
    job_reports,
    job_metrics,
    promotions,
    spending,
}
LATER = dt.datetime(2031, 5, 6, 7, 8, 9, tzinfo=dt.UTC)
#: a different value for each field of a new job
GIVEN: dict[str, Any] = {
    "tenant_id": "tenant-a",
    "model_id": MODEL_ID,
    "model_name": "name-of-the-model",
    "model_digest": "sha256:" + "1" * 64,
    "recipe": {"name": "of-the-recipe"},
    "queue": "gpu",
    "queue_reason": "why this queue",
    "needs_memory": 11,
    "needs_gpu_memory": 17,
    "needs_gpus": 6,
    "run_limit_s": 12.5,
    "stall_s": 13.5,
    "max_failures": 14,
    "name": "name-of-the-job",
    "priority": 15,
    "labels": {"label": "yes"},
    "data": {"reviews": {"id": "dat_1", "name": "reviews", "digest": "sha256:" + "2" * 64}},
    "run_after": LATER,
    "queue_limit_s": 16.5,
    "retry_of": None,
    "promote": False,
    "created_by": "key12345",
    "fingerprint": "3" * 64,
    "study_id": "std_of-the-job",
    "destinations": ["hf://acme/of-the-job"],
    "traceparent": "00-" + "4" * 32 + "-" + "5" * 16 + "-01",
}


SIX_GPUS = [{"uuid": f"GPU-device-42-{number}", "name": "device-42", "memory": 41} for number in range(6)]


def given(store: JobStore) -> NewJob:
    assert set(GIVEN) == {field.name for field in fields(NewJob)}, "give each field of a new job a value of its own"
    return NewJob(**{**GIVEN, "retry_of": submit(store)})


def queued(new: NewJob, rows: Rows) -> dict[str, Any]:
    values = {field.name: getattr(new, field.name) for field in fields(NewJob)}
    start_before = LATER + dt.timedelta(seconds=GIVEN["queue_limit_s"])
    return {**values, **UNTOUCHED, "id": identifier("job"), "created_at": rows.now, "start_before": start_before}


def submit_plain(store: JobStore, new: NewJob) -> Job:
    return store.submission.submit(new, max_queued=10)[0]


def submit_keyed(store: JobStore, new: NewJob) -> Job:
    return store.submission.submit(new, idempotency=Idempotency("key-of-the-client", "6" * 64), max_queued=10)[0]


def submit_in_a_batch(store: JobStore, new: NewJob) -> Job:
    return store.submission.submit_all([new, new_job(tenant_id=new.tenant_id)], max_queued=10)[0]


@pytest.mark.parametrize("write", [submit_plain, submit_keyed, submit_in_a_batch])
def test_a_new_job(store: JobStore, rows: Rows, write: Callable[[JobStore, NewJob], Job]) -> None:
    new = given(store)
    job = write(store, new)
    row = rows.check(jobs, queued(new, rows), jobs.c.id == job.id, alike=JOB_ALIKE)
    assert job == Job(**{column.name: row[column.name] for column in JOB_COLUMNS}), "the answer is the row"
    assert store.reader.get(new.tenant_id, job.id) == job
    rows.check(
        job_events,
        {"job_id": job.id, "seq": 1, "at": rows.now, "kind": "queued", "data": {}},
        job_events.c.job_id == job.id,
    )


@pytest.mark.parametrize("keyed", [False, True])
def test_an_uncounted_job_is_written_as_a_counted_one(store: JobStore, rows: Rows, keyed: bool) -> None:
    new = replace(given(store), retry_of=None)
    for index in range(3):
        key = Idempotency(f"key-{index}", "6" * 64) if keyed else None
        job, _ = store.submission.submit(new, idempotency=key, max_queued=10_000)
        rows.check(jobs, queued(new, rows), jobs.c.id == job.id, alike=JOB_ALIKE)


# The life of a job ---------------------------------------------------------------------------------------------------


def started(store: JobStore, rows: Rows, new: NewJob) -> tuple[Claimed, dict[str, Any]]:
    """A running job that has reported progress, log lines and an event; and its expected row."""
    job = store.submission.submit(replace(new, run_after=None), max_queued=10)[0]
    offer = WorkerOffer("worker-7", new.queue, "device-8", 1 << 40, 9, gpus(8, memory=41, name="device-42"))
    claimed = store.claims.claim(offer, ttl_s=600)
    assert claimed is not None
    assert claimed.job.id == job.id
    told = Progress(phase="pressing", fraction=0.25, pass_index=21, message="layer 3 of 12", eta_s=22.5)
    assert store.attempts.renew(claimed.lease, ttl_s=600, progress=told).held
    assert store.attempts.append_logs(claimed.lease, [("info", "first line"), ("warning", "second line")])
    assert store.attempts.record_event(claimed.lease, "checkpoint", {"step": 23})
    row = {
        **queued(new, rows),
        "state": "running",
        "phase": "pressing",
        "progress": 0.25,
        "pass_index": 21,
        "eta_s": 22.5,
        "message": "layer 3 of 12",
        "attempt": 1,
        "worker_id": "worker-7",
        "lease_id": claimed.lease.lease_id,
        "lease_expires_at": rows.after(600),
        "started_at": rows.now,
        "progressed_at": rows.now,
        "run_after": rows.now,
        "start_before": None,
        "event_seq": 3,
        "log_seq": 2,
    }
    return claimed, row


RESTING = {"phase": None, "pass_index": None, "eta_s": None, "lease_id": None, "lease_expires_at": None}


def test_from_the_queue_to_a_result_that_another_job_is_given(store: JobStore, rows: Rows) -> None:
    new = replace(given(store), promote=True)
    rows.check(jobs, queued(new, rows), jobs.c.id == store.submission.submit(new, max_queued=10)[0].id, alike=JOB_ALIKE)
    claimed, row = started(store, rows, new)
    job_id = claimed.job.id
    mine = jobs.c.id == job_id
    rows.check(jobs, row, mine, alike=JOB_ALIKE)
    for seq, (level, text) in enumerate([("info", "first line"), ("warning", "second line")], 1):
        line = {"job_id": job_id, "seq": seq, "at": rows.now, "attempt": 1, "level": level, "text": text}
        rows.check(job_logs, line, job_logs.c.job_id == job_id, job_logs.c.seq == seq, alike=frozenset({"attempt"}))
    attempt = {
        "job_id": job_id,
        "number": 1,
        "lease_id": claimed.lease.lease_id,
        "worker_id": "worker-7",
        "started_at": rows.now,
        "finished_at": None,
        "outcome": None,
        "error": None,
        "swept": False,
        "gpus": SIX_GPUS,
        "memory_limit": (1 << 40) * 6 // 8,
        "cost_micros": None,
    }
    rows.check(job_attempts, attempt, job_attempts.c.job_id == job_id)

    files = (FileEntry(path="model.onnx", size=31, sha256="a" * 64),)
    artifact = ArtifactEntry(format="onnx", path="folder-of-it", files=files, consumer="onnxruntime 1.32")
    report_files = (FileEntry(path="report.json", size=32, sha256="b" * 64),)
    manifest = Manifest(job_id=job_id, attempt=1, verdict="accepted", artifacts=(artifact,), report=report_files)
    metric = MetricRow("onnx", "latency", 33.5, unit="ms", low=34.5, high=35.5)
    assert store.attempts.finish(claimed.lease, Succeeded("accepted", manifest, {"figure": 36}, [metric]))
    ended = {
        **row,
        **RESTING,
        "state": "succeeded",
        "verdict": "accepted",
        "progress": 1.0,
        "engine": ENGINE,
        "finished_at": rows.now,
        "event_seq": 4,
    }
    rows.check(jobs, ended, mine, alike=JOB_ALIKE)
    closed = {**attempt, "finished_at": rows.now, "outcome": "succeeded"}
    rows.check(job_attempts, closed, job_attempts.c.job_id == job_id)

    again = store.submission.submit(new, max_queued=10)[0]
    assert store.requests.reuse(again).reused_from == job_id
    reused = {
        **queued(new, rows),
        "state": "succeeded",
        "verdict": "accepted",
        "progress": 1.0,
        "engine": ENGINE,
        "reused_from": job_id,
        "start_before": None,
        "finished_at": rows.now,
        "event_seq": 2,
    }
    # The verdict and the engine are those of the other job.
    rows.check(jobs, reused, jobs.c.id == again.id, alike=JOB_ALIKE)
    for owner, report in ((job_id, {"figure": 36}), (again.id, {"figure": 36, "reused_from": job_id})):
        stored = {
            "id": identifier("art"),
            "job_id": owner,
            "attempt": 1,
            "format": "onnx",
            "path": "folder-of-it",
            "size": 31,
            "digest": artifact.digest,
            "consumer": "onnxruntime 1.32",
            "files": [files[0].model_dump()],
        }
        rows.check(job_artifacts, stored, job_artifacts.c.job_id == owner)
        kept = {"job_id": owner, "report": report, "files": [report_files[0].model_dump()]}
        rows.check(job_reports, kept, job_reports.c.job_id == owner)
        figure = {"subject": "onnx", "name": "latency", "value": 33.5, "unit": "ms", "low": 34.5, "high": 35.5}
        rows.check(job_metrics, {"job_id": owner, "position": 0, **figure}, job_metrics.c.job_id == owner)
        pointed = {
            "id": identifier("prm"),
            "tenant_id": new.tenant_id,
            "model_name": new.model_name,
            "job_id": owner,
            "cause": "accepted",
            "created_by": None,
            "created_at": rows.now,
        }
        rows.check(promotions, pointed, promotions.c.job_id == owner)
    rows.all_seen(job_artifacts, job_reports, job_metrics, job_logs)


def test_a_job_that_fails(store: JobStore, rows: Rows, engine: Engine) -> None:
    new = replace(given(store), max_failures=1)
    claimed, row = started(store, rows, new)
    error = NightpressError(ErrorCode.NUMERICAL_FAILURE, "It came to nothing.")
    assert store.attempts.fail(claimed.lease, error, backoff_s=5.0) == "failed"
    ended = {
        **row,
        **RESTING,
        "state": "failed",
        "failures": 1,
        "error": error.as_dict(),
        "error_code": "numerical_failure",
        "finished_at": rows.now,
        "event_seq": 4,
    }
    alike = JOB_ALIKE | {"max_failures"}
    rows.check(jobs, ended, jobs.c.id == claimed.job.id, alike=alike)
    attempt = {
        "job_id": claimed.job.id,
        "number": 1,
        "lease_id": claimed.lease.lease_id,
        "worker_id": "worker-7",
        "started_at": rows.now,
        "finished_at": rows.now,
        "outcome": "failed",
        "error": error.as_dict(),
        "swept": False,
        "gpus": SIX_GPUS,
        "memory_limit": (1 << 40) * 6 // 8,
        "cost_micros": None,
    }
    rows.check(job_attempts, attempt, job_attempts.c.job_id == claimed.job.id)
    with transaction(engine) as connection:
        connection.execute(update(job_attempts).values(started_at=db_now(-1000)))
    assert CostLedger(engine, PriceList({"gpu": 600.0}, "EUR")).count_ended() == 1
    cost = Chosen("<about 1e9>", lambda value: 940_000_000 < value <= 1_000_000_000)
    counted = attempt | {"started_at": rows.after(-1000), "cost_micros": cost}
    rows.check(job_attempts, counted, job_attempts.c.job_id == claimed.job.id)
    with transaction(engine, read_only=True) as connection:
        today = connection.execute(select(db_day())).scalar_one()
    tenant = claimed.job.tenant_id
    rows.check(spending, {"tenant_id": tenant, "day": today, "micros": cost})
    rows.all_seen(spending, job_attempts)


def test_a_job_that_gpus_are_held_back_for(store: JobStore, rows: Rows) -> None:
    new = replace(given(store), run_after=None, queue_limit_s=None, priority=1)
    offer = WorkerOffer("worker-7", "gpu", "device-8", 1 << 40, 9, gpus(8, memory=41))
    submit(store, queue="gpu", needs_gpus=3, priority=2)
    assert store.claims.claim(offer, ttl_s=600) is not None
    job = store.submission.submit(new, max_queued=10)[0]
    assert store.claims.claim(offer, ttl_s=600) is None
    held = {"run_after": rows.now, "start_before": None, "held_by": "worker-7", "held_until": rows.after(HELD_BACK_S)}
    rows.check(jobs, queued(new, rows) | held, jobs.c.id == job.id, alike=JOB_ALIKE | {"priority"})


def test_every_column_of_a_job_has_been_seen_with_a_value() -> None:
    """The tests above compare a job when it is submitted, while it runs, and at its end: together they cover all columns."""
    told = {name for name, value in UNTOUCHED.items() if value is not None} | set(GIVEN)
    running = {"phase", "pass_index", "eta_s", "worker_id", "lease_id", "lease_expires_at", "started_at"}
    ended = {"progressed_at", "finished_at", "verdict", "engine", "reused_from", "error", "error_code"}
    held = {"held_by", "held_until"}
    assert told | running | ended | held | {"id", "created_at", "start_before"} == set(jobs.c.keys())
