"""Every column of jobs that the service and schedules submit: what was asked for, and what they add."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nightpress.core.service.tables.jobs import idempotency_keys, jobs
from nightpress.core.service.tables.schedules import schedule_runs
from nightpress.core.wire.jobs import JobCreate, JobRequest
from tests.columns import JOB_ALIKE, UNTOUCHED, Rows, identifier
from tests.integration.test_schedules import TENANT, World, utc

RECIPE: dict[str, Any] = {
    "name": "of-these-tests",
    "passes": [{"pass": "dynamic-int8"}],
    "exports": ["onnx"],
    "evaluate": [{"metric": "fidelity", "samples": 4, "length": 16}],
}
SAID: dict[str, Any] = {
    "name": "name-of-the-job",
    "priority": 15,
    "labels": {"label": "yes"},
    "promote": False,
    "destinations": ["hf://acme/of-the-job"],
    "queue_limit_s": 3600.5,
    "run_limit_s": 1234.5,
    "max_failures": 14,
}


@pytest.fixture
def world(tmp_path: Path, sql_url: str, bert_tiny: Path) -> Iterator[World]:
    world = World(tmp_path, sql_url, bert_tiny, destinations=["hf://acme"])
    yield world
    world.engine.dispose()


def resolved(world: World, rows: Rows, **more: Any) -> dict[str, Any]:
    """The expected row of a job that the service makes of SAID."""
    spec = JobRequest(model="tiny", recipe=RECIPE, **SAID)
    model = world.models.get(TENANT, "tiny")
    new = world.jobs._resolve(TENANT, JobCreate(**spec.model_dump()), "key12345")
    assert (new.model_digest, new.recipe["name"]) == (model.digest, "of-these-tests")
    assert new.fingerprint == world.jobs.fingerprint(TENANT, spec)
    return {
        **UNTOUCHED,
        **SAID,
        "id": identifier("job"),
        "tenant_id": TENANT,
        "queue": "cpu",
        "queue_reason": new.queue_reason,
        "needs_memory": new.needs_memory,
        "needs_gpu_memory": new.needs_gpu_memory,
        "needs_gpus": new.needs_gpus,
        "model_id": model.id,
        "model_name": "tiny",
        "model_digest": model.digest,
        "recipe": new.recipe,
        "data": {},
        "fingerprint": new.fingerprint,
        "retry_of": None,
        "created_by": "key12345",
        "traceparent": None,
        "study_id": None,
        "stall_s": world.settings.stall_s,
        "created_at": rows.now,
        "run_after": rows.now,
        "start_before": rows.after(SAID["queue_limit_s"]),
        **more,
    }


def test_what_the_service_submits_and_retries(world: World) -> None:
    rows = Rows(world.engine)
    wanted = JobCreate(model="tiny", recipe=RECIPE, **SAID)
    row = resolved(world, rows)
    plain, _ = world.jobs.submit(TENANT, wanted, key_id="key12345")
    keyed, _ = world.jobs.submit(TENANT, wanted, "key-of-the-client", key_id="key12345")
    batch = world.jobs.submit_all(TENANT, [wanted, wanted], key_id="key12345")
    for job in (plain, keyed, *batch):
        rows.check(jobs, row, jobs.c.id == job.id, alike=JOB_ALIKE)
    book = {
        "tenant_id": TENANT,
        "key": "key-of-the-client",
        "job_id": keyed.id,
        "attempt_id": None,
        "locked_until": None,
        "status": None,
        "headers": None,
        "body": None,
        "created_at": rows.now,
    }
    with world.engine.connect() as connection:
        digest = connection.execute(idempotency_keys.select()).one().fingerprint
    assert digest != row["fingerprint"]
    rows.check(idempotency_keys, {**book, "fingerprint": digest}, idempotency_keys.c.job_id == keyed.id)
    world.end_jobs()
    again = world.jobs.retry(TENANT, keyed.id, key_id="key67890")
    retried = {**row, "retry_of": keyed.id, "created_by": "key67890"}
    rows.check(jobs, retried, jobs.c.id == again.id, alike=JOB_ALIKE)


def test_what_a_schedule_submits(world: World) -> None:
    rows = Rows(world.engine)
    made = world.schedule("2026-11-23T02:00", job=JobRequest(model="tiny", recipe=RECIPE, **SAID), key_id="key12345")
    world.tick("2026-11-23T02:00")
    [run] = world.runs()
    row = resolved(world, rows)
    rows.check(jobs, row, jobs.c.id == run.job_id, alike=JOB_ALIKE)
    fire = {
        "id": identifier("run"),
        "schedule_id": made.id,
        "scheduled_for": utc("2026-11-23T02:00"),
        "cause": "cron",
        "state": "submitted",
        "reason": None,
        "error": None,
        "job_id": run.job_id,
        "study_id": None,
        "model_id": None,
        "revision": None,
        "digest": row["model_digest"],
        "fingerprint": row["fingerprint"],
        "created_at": rows.now,
    }
    rows.check(schedule_runs, fire, schedule_runs.c.id == run.id)
