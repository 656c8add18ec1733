"""What the control process takes from workers: leases that ran out, and runs that stall or pass a deadline; on both kinds of database."""

import time
from collections.abc import Callable

from sqlalchemy import Engine, event

from nightpress.core.handoff.frames import Progress
from nightpress.core.service.jobs.expiry import SUPERVISOR_GRACE_S
from nightpress.core.service.jobs.store import JobStore
from tests.jobs import age, claim, load, submit


def test_a_lost_worker_counts_as_a_failure_and_is_named(store: JobStore, engine: Engine):
    job_id = submit(store, max_failures=1)
    claim(store)
    age(engine, job_id, 100, "lease_expires_at")
    assert store.expiry.expire_leases(backoff_s=1.0) == [job_id]
    job = load(store, job_id)
    assert job.state == "failed"
    assert job.error is not None
    assert job.error["code"] == "worker_lost"
    assert store.expiry.expire_leases(backoff_s=1.0) == [], "the second replica finds nothing to do"


def once_they_were_found(engine: Engine, happens: Callable[[], object]) -> None:
    """Call `happens` after the control process has found the due jobs and before its first transition."""

    @event.listens_for(engine, "checkin", once=True)
    def after_the_look(_connection: object, _record: object) -> None:
        happens()


def test_a_lease_that_is_renewed_at_the_last_moment_is_left_alone(store: JobStore, engine: Engine):
    job_id = submit(store)
    lease = claim(store).lease
    age(engine, job_id, 100, "lease_expires_at")
    once_they_were_found(engine, lambda: store.attempts.renew(lease, ttl_s=60))
    assert store.expiry.expire_leases(backoff_s=1.0) == []
    assert load(store, job_id).state == "running"


def test_a_job_that_is_started_at_the_last_moment_has_met_its_queue_deadline(store: JobStore, engine: Engine):
    job_id = submit(store, queue_limit_s=5.0)
    age(engine, job_id, 6, "start_before")
    once_they_were_found(engine, lambda: store.attempts.release(claim(store).lease))
    assert store.expiry.expire_queue_deadlines() == []
    assert load(store, job_id).state == "queued"


def test_a_run_past_its_limit_that_its_worker_let_go_on_fails(store: JobStore, engine: Engine):
    job_id = submit(store, run_limit_s=10.0)
    claim(store)
    age(engine, job_id, 11, "started_at")
    assert store.expiry.expire_leases(backoff_s=1.0) == [], "the worker has the first right to stop it"
    age(engine, job_id, SUPERVISOR_GRACE_S, "started_at")
    assert store.expiry.expire_leases(backoff_s=1.0) == [job_id]
    assert (load(store, job_id).error or {})["code"] == "deadline_exceeded"


def test_a_wedged_run_is_taken_away_though_its_worker_renews(store: JobStore, engine: Engine):
    job_id = submit(store, stall_s=10.0)
    lease = claim(store).lease
    same = Progress(phase="pressing", fraction=0.5)
    store.attempts.renew(lease, ttl_s=60, progress=same)
    age(engine, job_id, 11 + SUPERVISOR_GRACE_S, "progressed_at")
    store.attempts.renew(lease, ttl_s=60, progress=same)
    assert store.expiry.expire_leases(backoff_s=1.0) == [job_id]
    assert store.reader.events(job_id)[-1].data["error"]["code"] == "stalled"


def test_progress_keeps_a_run_alive(store: JobStore, engine: Engine):
    job_id = submit(store, stall_s=10.0)
    lease = claim(store).lease
    age(engine, job_id, 11 + SUPERVISOR_GRACE_S, "progressed_at")
    store.attempts.renew(lease, ttl_s=60, progress=Progress(phase="pressing", fraction=0.5))
    assert store.expiry.expire_leases(backoff_s=1.0) == []


def test_a_queue_deadline_holds_only_until_the_first_start(store: JobStore, engine: Engine):
    started = submit(store, queue_limit_s=0.05)
    store.attempts.release(claim(store).lease)
    time.sleep(0.1)
    waiting = submit(store, queue_limit_s=5.0)
    age(engine, waiting, 6, "start_before")
    assert store.expiry.expire_queue_deadlines() == [waiting]
    assert load(store, started).state == "queued"
    assert (load(store, waiting).error or {})["code"] == "queue_deadline_exceeded"
