"""Every column of every table but those of jobs and models: each gets a value of its own, and the test reads it back."""

import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, select, update

from nightpress.core.database import db_month, db_now, metadata, transaction
from nightpress.core.service.access.audit import AuditLog
from nightpress.core.service.access.idempotency import Answered, Begun, IdempotencyBook
from nightpress.core.service.access.keys import KeyRing, create_key, revoke
from nightpress.core.service.access.oidc.people import PeopleBook
from nightpress.core.service.access.oidc.sessions import Confirmed, SessionBook, digest_of
from nightpress.core.service.access.quotas import QuotaBook
from nightpress.core.service.jobs.checkpoints import CheckpointIndex, StoredFile
from nightpress.core.service.jobs.records import Worker
from nightpress.core.service.jobs.source_figures import KeptSource
from nightpress.core.service.jobs.store import JobStore
from nightpress.core.service.tables.access import api_keys, audit_log, gpu_usage, people, sessions, tenants
from nightpress.core.service.tables.jobs import (
    checkpoint_files,
    checkpoints,
    idempotency_keys,
    source_figures,
    workers,
)
from nightpress.core.service.tables.schedules import schedule_runs, schedules
from nightpress.core.settings import Settings
from nightpress.core.wire.access import QuotaChange
from nightpress.core.wire.jobs import JobRequest
from nightpress.core.wire.schedules import ScheduleUpdate
from nightpress.core.wire.studies import StudyRequest
from tests.columns import DIGEST, MAPPING, WORDS, Chosen, Rows, identifier, whole_id
from tests.integration import (
    test_columns_of_jobs,
    test_columns_of_models,
    test_columns_of_outboxes,
    test_columns_of_studies,
    test_deliveries,
)
from tests.integration.test_schedules import TENANT, World, utc
from tests.jobs import age, claim, host, submit
from tests.racing import all_at_once

COVERED = {
    api_keys,
    audit_log,
    checkpoint_files,
    checkpoints,
    gpu_usage,
    idempotency_keys,
    people,
    schedule_runs,
    schedules,
    sessions,
    source_figures,
    tenants,
    workers,
}


@pytest.fixture
def world(tmp_path: Path, sql_url: str, bert_tiny: Path) -> Iterator[World]:
    world = World(tmp_path, sql_url, bert_tiny)
    yield world
    world.engine.dispose()


def test_every_table_is_covered() -> None:
    others = test_columns_of_jobs.COVERED | test_columns_of_models.COVERED | test_columns_of_studies.COVERED
    others |= test_deliveries.COVERED | test_columns_of_outboxes.COVERED
    assert set(metadata.tables.values()) == COVERED | others


# Access --------------------------------------------------------------------------------------------------------------


def test_tenants_keys_audit_and_gpu_time(engine: Engine, rows: Rows, store: JobStore, tmp_path: Path) -> None:
    book = QuotaBook(engine, Settings(_env_file=None, data_dir=tmp_path))
    bounds = {
        "max_queued_jobs": 11,
        "max_running_jobs": 12,
        "max_storage_bytes": 13,
        "max_gpu_seconds_month": 14,
        "rate_limit_per_minute": 15,
        "max_cost_day": 18,
        "max_cost_month": 19,
    }
    book.change("tenant-a", QuotaChange(**bounds))
    book.change("tenant-a", QuotaChange(max_queued_jobs=16))
    changed = {**bounds, "id": "tenant-a", "max_queued_jobs": 16, "version": 2, "created_at": rows.now}
    rows.check(tenants, changed)

    ends = utc("2031-05-06T07:08:09")
    made = {"rotated_from": "key12345", "made_by": "key67890", "family": "keyabcde"}
    given: dict[str, Any] = {"tenant_id": "tenant-a", "name": "name-of-the-key", "expires_at": ends}
    record, plain = create_key(engine, **given, scopes=["jobs:read"], **made)
    KeyRing(engine).authenticate(plain)
    assert revoke(engine, record.id)
    key = {
        **given,
        "id": record.id,
        "digest": hashlib.sha256(plain.encode()).hexdigest(),
        "scopes": ["jobs:read"],
        "created_at": rows.now,
        "revoked_at": rows.now,
        "last_used_at": rows.now,
        **made,
    }
    rows.check(api_keys, key)

    book_of_people = PeopleBook(engine)
    claims = {"iss": "https://login", "sub": "subject-1", "name": "Ada", "email": "ada@example.com"}
    person_id, _, _ = book_of_people.know(claims)
    assert PeopleBook(engine).know(claims | {"name": "Ada L."})[0] == person_id
    person = {"id": person_id, "issuer": "https://login", "subject": "subject-1", "name": "Ada L."}
    rows.check(people, {**person, "email": "ada@example.com", "created_at": rows.now, "seen_at": rows.now})
    grants = {"engineers": {"tenant": "tenant-s", "scopes": ["jobs:read"]}}
    sign_in_settings = Settings(
        _env_file=None, data_dir=tmp_path, oidc_groups=grants, oidc_recheck_s=1000, session_s=5000
    )
    session_book = SessionBook(engine, sign_in_settings)
    cookie = session_book.begin(
        Confirmed(person_id, ["engineers"], "sealed"), "tenant-s", state="the-state", replaces=None
    )
    assert session_book.authenticate(cookie).tenant_id == "tenant-s"
    session: dict[str, Any] = {
        "id": identifier("ses"),
        "person_id": person_id,
        "tenant_id": "tenant-s",
        "groups": ["engineers"],
        "digest": digest_of(cookie),
        "state_digest": digest_of("the-state"),
        "refresh_token": "sealed",
        **dict.fromkeys(["created_at", "seen_at", "confirmed_at"], rows.now),
        "check_at": rows.after(1000),
        "ends_at": rows.after(5000),
        "ended_at": None,
        "reason": None,
    }
    rows.check(sessions, session)
    with transaction(engine) as connection:
        connection.execute(update(sessions).values(check_at=db_now(-1)))
    taken = all_at_once(engine, select(sessions), SessionBook(engine, sign_in_settings).take_due)
    (due,) = [found for found in taken if found is not None]
    session_book.confirm(due, ["engineers", "others"], "sealed anew")
    session_book.prune()
    session |= {"groups": ["engineers", "others"], "refresh_token": "sealed anew"}
    rows.check(sessions, session)
    session_book.end(cookie)
    rows.check(sessions, session | {"refresh_token": None, "ended_at": rows.now, "reason": "signed_out"})

    line: dict[str, Any] = {
        "tenant_id": "tenant-a",
        "key_id": "key12345",
        "action": "POST /v1/jobs",
        "subject": "/v1/jobs",
        "status": 201,
        "request_id": "req_1",
    }
    AuditLog(engine).note(**line)
    rows.check(audit_log, {**line, "id": identifier("aud"), "at": rows.now})

    job_id = submit(store, tenant_id="tenant-b", queue="gpu", needs_gpus=2)
    claimed = store.claims.claim(host(count=2), ttl_s=600)
    assert claimed is not None
    age(engine, job_id, 100, "started_at")
    assert store.attempts.release(claimed.lease)
    with transaction(engine, read_only=True) as connection:
        month = connection.execute(select(db_month())).scalar_one()
    seconds = Chosen("<about 100 on each of two GPUs>", lambda value: 200 <= value < 320)
    rows.check(gpu_usage, {"tenant_id": "tenant-b", "month": month, "seconds": seconds})
    rows.all_seen(tenants, api_keys, audit_log, gpu_usage, people, sessions)


def test_answers_to_requests_under_a_key(engine: Engine, rows: Rows) -> None:
    book = IdempotencyBook(engine)
    begun = book.begin("tenant-a", "key-of-the-client", "f" * 64)
    assert isinstance(begun, Begun)
    row = {
        "tenant_id": "tenant-a",
        "key": "key-of-the-client",
        "fingerprint": "f" * 64,
        "job_id": None,
        "attempt_id": begun.attempt_id,
        "locked_until": rows.after(120),
        "status": None,
        "headers": None,
        "body": None,
        "created_at": rows.now,
    }
    rows.check(idempotency_keys, row)
    book.answer(begun, Answered(201, {"Location": "/v1/keys/1"}, b"the body"))
    body = Chosen("<packed body>", lambda value: zlib.decompress(value) == b"the body")
    answered = {"status": 201, "headers": {"Location": "/v1/keys/1"}, "body": body, "locked_until": None}
    rows.check(idempotency_keys, {**row, **answered})


# Workers and their checkpoints ---------------------------------------------------------------------------------------


def test_workers(engine: Engine, rows: Rows, store: JobStore) -> None:
    worker = Worker(
        id="worker-1",
        host="host-2",
        queue="gpu",
        device="device-3",
        memory=14,
        threads=15,
        version="version-6",
        draining=True,
        unfit="the disk is full",
        gpu_memory=17,
        gpu_memory_used=18,
        gpus=[{"uuid": "GPU-8", "name": "device-9", "memory": 19, "memory_used": 20}],
        gpu_kinds=[[21, 22]],
        cpu_jobs=23,
        vllm=True,
    )
    told = {column.name: getattr(worker, column.name) for column in workers.c if not column.name.endswith("_at")}
    for _ in range(2):  # the first heartbeat inserts the row, the second updates it
        store.roster.heartbeat_worker(worker)
        rows.check(workers, {**told, "started_at": rows.now, "last_seen_at": rows.now, "left_at": None})
    store.roster.remove_worker(worker.id)
    rows.check(workers, {**told, "started_at": rows.now, "last_seen_at": rows.now, "left_at": rows.now})
    rows.all_seen(workers)


def test_checkpoints(engine: Engine, rows: Rows, store: JobStore) -> None:
    index = CheckpointIndex(engine)
    submit(store)
    lease = claim(store).lease
    assert index.take(lease, "d" * 64)
    assert index.add(lease, "d" * 64, StoredFile("folder/of-it", 11, "e" * 64, 12, lease.job_id), limit=100)
    prefix = {"digest": "d" * 64, "job_id": lease.job_id, "lease_id": lease.lease_id, "size": 11, "used_at": rows.now}
    rows.check(checkpoints, prefix)
    file = {"digest": "d" * 64, "path": "folder/of-it", "size": 11, "sha256": "e" * 64, "step": 12}
    rows.check(checkpoint_files, {**file, "job_id": lease.job_id})
    rows.all_seen(checkpoints, checkpoint_files)


def test_outputs_of_sources(engine: Engine, rows: Rows, store: JobStore) -> None:
    row = {"digest": "d" * 64, "tenant_id": "tenant-a", "model_digest": "sha256:of-the-model", "outdated": False}
    times = {"measured_at": rows.now, "used_at": rows.now}
    for kept in (KeptSource("job_1", "e" * 64, 11), KeptSource("job_2", "f" * 64, 12)):  # inserted, then replaced
        store.sources.put("d" * 64, kept, tenant_id="tenant-a", model_digest="sha256:of-the-model")
        rows.check(source_figures, {**row, **asdict(kept), **times})
    store.sources.outdate("tenant-a", "sha256:of-the-model")
    rows.check(source_figures, {**row, **asdict(kept), **times, "outdated": True})
    rows.all_seen(source_figures)


# Schedules -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_schedules_and_their_runs(world: World, tmp_path: Path) -> None:
    rows = Rows(world.engine)
    source = tmp_path / "roots" / "source"
    source.mkdir(parents=True)
    for file in world.model.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    job = JobRequest(model="tiny", recipe="int8-encoder", name="name-of-the-job")
    given: dict[str, Any] = {"timezone": "Asia/Tokyo", "overlap": "queue", "catch_up": "all", "only_if_changed": True}
    made = world.schedule("2026-11-23T02:00", job=job, key_id="key12345", source=str(source), **given)
    row = {
        **given,
        "id": made.id,
        "tenant_id": TENANT,
        "name": "nightly",
        "cron": "0 * * * *",
        "suspended": False,
        "job": job.model_dump(mode="json", exclude_none=True),
        "source": str(source),
        "study": None,
        "version": 1,
        "next_at": utc("2026-11-23T02:00"),
        "created_by": "key12345",
        "created_at": rows.now,
        "updated_at": rows.now,
    }
    rows.check(schedules, row)
    world.settle("2026-11-23T02:00")
    world.end_jobs_well()
    world.settle("2026-11-23T03:00")
    submitted, skipped = world.runs()
    pressed = world.store.reader.get(TENANT, str(submitted.job_id))
    assert pressed is not None
    run = {
        "id": submitted.id,
        "schedule_id": made.id,
        "scheduled_for": utc("2026-11-23T02:00"),
        "cause": "cron",
        "state": "submitted",
        "reason": None,
        "error": None,
        "job_id": submitted.job_id,
        "study_id": None,
        "model_id": pressed.model_id,
        "revision": WORDS,
        "digest": pressed.model_digest,
        "fingerprint": pressed.fingerprint,
        "created_at": rows.now,
    }
    rows.check(schedule_runs, run, schedule_runs.c.id == submitted.id)
    nothing = {"job_id": None, "model_id": None, "digest": None, "fingerprint": None}
    left_out = {"id": skipped.id, "scheduled_for": utc("2026-11-23T03:00"), "state": "skipped", "reason": "unchanged"}
    rows.check(schedule_runs, {**run, **nothing, **left_out}, schedule_runs.c.id == skipped.id)
    (source / "model.safetensors").write_bytes(b"no model at all")
    world.settle("2026-11-23T04:00")
    failed = world.runs()[-1]
    broken = {"id": failed.id, "scheduled_for": utc("2026-11-23T04:00"), "state": "failed", "error": MAPPING}
    broken |= {"revision": None}
    rows.check(schedule_runs, {**run, **nothing, **broken}, schedule_runs.c.id == failed.id)
    study = StudyRequest(model="tiny", gates={"cosine": ">= 0.9"}, hours=3.0)
    world.service.edit(TENANT, "nightly", ScheduleUpdate(study=study))
    said = {"study": study.model_dump(mode="json", exclude_unset=True), "job": {"model": "tiny", "recipe": "study"}}
    rows.check(schedules, {**row, **said, "version": 2, "next_at": utc("2026-11-23T05:00")})
    (source / "model.safetensors").write_bytes((world.model / "model.safetensors").read_bytes())
    world.settle("2026-11-23T05:00")
    begun = world.runs()[-1]
    searched = {"id": begun.id, "scheduled_for": utc("2026-11-23T05:00"), "study_id": identifier("std"), "job_id": None}
    searched |= {"fingerprint": whole_id(64), "model_id": identifier("mdl"), "digest": DIGEST}
    rows.check(schedule_runs, {**run, **searched}, schedule_runs.c.id == begun.id)
    rows.all_seen(schedules, schedule_runs)
