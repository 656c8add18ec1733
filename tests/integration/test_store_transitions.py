"""Every trigger in every state, on both kinds of database: transitions in the table happen, and all others change nothing."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from sqlalchemy import Engine, select, text

import nightpress.core.service.jobs.attempts
from nightpress.core.database import transaction
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.frames import Progress
from nightpress.core.service.jobs.expiry import SUPERVISOR_GRACE_S
from nightpress.core.service.jobs.records import Job, Lease
from nightpress.core.service.jobs.states import ALL_STATES, TRANSITIONS, Trigger, is_terminal
from nightpress.core.service.jobs.store import JobStore
from nightpress.core.service.tables.jobs import job_attempts, job_events, jobs
from nightpress.core.wire.jobs import JobState
from tests.jobs import age, claim, load, offer, submit, succeeded
from tests.service import eventually

TENANT = "default"
RETRYABLE = NightpressError(ErrorCode.OUT_OF_MEMORY, "too large", hint="a larger worker")
FINAL = NightpressError(ErrorCode.NUMERICAL_FAILURE, "not finite")


def job_in(store: JobStore, state: JobState) -> tuple[str, Lease]:
    """Bring a job into a state with the store's own functions. Returns its id and its current or last lease."""
    job_id = submit(store, queue_limit_s=1000.0, fingerprint="same")
    if state == "queued":
        return job_id, Lease(job_id, "lease_none", 1, "worker-1")
    lease = claim(store).lease
    if state in {"cancelling", "cancelled"}:
        store.requests.request_cancel(TENANT, job_id)
    if state == "cancelled":
        store.attempts.confirm_cancelled(lease)
    if state == "succeeded":
        store.attempts.finish(lease, succeeded(lease))
    if state == "failed":
        store.attempts.fail(lease, FINAL, backoff_s=1)
    return job_id, lease


def _queue_deadline(store: JobStore, engine: Engine, job_id: str, _lease: Lease) -> object:
    job = store.reader.get(TENANT, job_id)
    assert job is not None
    if job.state == "queued":
        age(engine, job_id, 2000, "start_before")
    return store.expiry.expire_queue_deadlines()


def _when_due(column: str, seconds: float) -> Callable[[JobStore, Engine, str, Lease], object]:
    def pull(store: JobStore, engine: Engine, job_id: str, _lease: Lease) -> object:
        job = store.reader.get(TENANT, job_id)
        assert job is not None
        if getattr(job, column) is not None:
            age(engine, job_id, seconds, column)
        return store.expiry.expire_leases(backoff_s=1)

    return pull


def _reuse(store: JobStore, _engine: Engine, job_id: str, _lease: Lease) -> object:
    twin = submit(store, priority=9, fingerprint="same")
    claimed = claim(store)
    assert claimed.job.id == twin
    store.attempts.finish(claimed.lease, succeeded(claimed.lease))
    return store.requests.reuse(load(store, job_id))


#: (trigger, variant, function that pulls it)
PULLS: list[tuple[Trigger, str, Callable[[JobStore, Engine, str, Lease], object]]] = [
    (Trigger.CLAIM, "", lambda store, _engine, _job, _lease: store.claims.claim(offer("worker-2"), ttl_s=60)),
    (Trigger.RENEW, "", lambda store, _engine, _job, lease: store.attempts.renew(lease, ttl_s=60).held),
    (Trigger.RENEW, "event", lambda store, _engine, _job, lease: store.attempts.record_event(lease, "phase", {})),
    (Trigger.RENEW, "logs", lambda store, _engine, _job, lease: store.attempts.append_logs(lease, [("info", "line")])),
    (Trigger.FINISH, "", lambda store, _engine, _job, lease: store.attempts.finish(lease, succeeded(lease))),
    (Trigger.FAIL, "retryable", lambda store, _engine, _job, lease: store.attempts.fail(lease, RETRYABLE, backoff_s=1)),
    (Trigger.FAIL, "final", lambda store, _engine, _job, lease: store.attempts.fail(lease, FINAL, backoff_s=1)),
    (Trigger.RELEASE, "", lambda store, _engine, _job, lease: store.attempts.release(lease)),
    (Trigger.CANCEL, "", lambda store, _engine, job, _lease: store.requests.request_cancel(TENANT, job)),
    (Trigger.CONFIRM_CANCELLED, "", lambda store, _engine, _job, lease: store.attempts.confirm_cancelled(lease)),
    (Trigger.LEASE_EXPIRED, "", _when_due("lease_expires_at", 61)),
    (Trigger.STALLED, "", _when_due("progressed_at", 1801 + SUPERVISOR_GRACE_S)),
    (Trigger.RUN_DEADLINE, "", _when_due("started_at", 3601 + SUPERVISOR_GRACE_S)),
    (Trigger.QUEUE_DEADLINE, "", _queue_deadline),
    (Trigger.REUSE, "", _reuse),
]


def everything(engine: Engine, job_id: str) -> tuple[object, ...]:
    """The job's row without times, the number of its events, and its attempts, from the database."""
    with transaction(engine, read_only=True) as connection:
        job = connection.execute(select(jobs).where(jobs.c.id == job_id)).one()
        events = connection.execute(select(job_events).where(job_events.c.job_id == job_id)).all()
        attempts = connection.execute(select(job_attempts).where(job_attempts.c.job_id == job_id)).all()
    timeless = {
        name: value for name, value in job._mapping.items() if not name.endswith("_at") and name != "start_before"
    }
    return timeless, len(events), tuple((attempt.number, attempt.outcome) for attempt in attempts)


def test_every_trigger_of_the_table_is_pulled_here():
    assert {trigger for trigger, _, _ in PULLS} == set(Trigger)


@pytest.mark.parametrize(
    ("trigger", "way", "pull"), PULLS, ids=[f"{trigger}-{way}".strip("-") for trigger, way, _ in PULLS]
)
@pytest.mark.slow
def test_all_pairs_of_states_and_triggers(
    store: JobStore, engine: Engine, trigger: Trigger, way: str, pull: Callable[[JobStore, Engine, str, Lease], object]
):
    for state in ALL_STATES:
        job_id, lease = job_in(store, state)
        before = everything(engine, job_id)
        answer = pull(store, engine, job_id, lease)
        after = load(store, job_id)
        allowed = TRANSITIONS[trigger].get(state)
        if allowed is None:
            assert everything(engine, job_id) == before, f"{trigger} changed a {state} job"
            assert answer is None or not answer or isinstance(answer, Job), (
                f"{trigger} claims to have changed a {state} job"
            )
        else:
            assert after.state in allowed, f"{trigger} led from {state} to {after.state}"
            assert answer
        assert (after.lease_id is not None) == (after.state in {"running", "cancelling"})
        numbers = [event.seq for event in store.reader.events(job_id)]
        assert numbers == list(range(1, len(numbers) + 1))
        _clear(store, job_id)


def _clear(store: JobStore, job_id: str) -> None:
    """End a job, so that the next claim doesn't find it."""
    job = load(store, job_id)
    if is_terminal(job.state):
        return
    cancelled = store.requests.request_cancel(TENANT, job_id)
    assert cancelled is not None
    if cancelled.state == "cancelling":
        assert store.attempts.confirm_cancelled(Lease(job_id, str(cancelled.lease_id), cancelled.attempt, "worker-1"))


WORKERS_PULLS = [
    pull
    for pull in PULLS
    if pull[0] in {Trigger.RENEW, Trigger.FINISH, Trigger.FAIL, Trigger.RELEASE, Trigger.CONFIRM_CANCELLED}
]


@pytest.mark.parametrize(
    ("trigger", "way", "pull"), WORKERS_PULLS, ids=[f"{trigger}-{way}".strip("-") for trigger, way, _ in WORKERS_PULLS]
)
def test_another_lease_on_the_same_job_changes_nothing(
    store: JobStore, engine: Engine, trigger: Trigger, way: str, pull: Callable[[JobStore, Engine, str, Lease], object]
):
    for state in ("running", "cancelling"):
        job_id, lease = job_in(store, state)
        before = everything(engine, job_id)
        assert not pull(store, engine, job_id, replace(lease, lease_id="lease_of_another"))
        assert everything(engine, job_id) == before
        _clear(store, job_id)


def test_a_retryable_failure_goes_back_to_the_queue_until_the_failures_are_used_up(store: JobStore, engine: Engine):
    job_id = submit(store, max_failures=2)
    lease = claim(store).lease
    assert store.attempts.fail(lease, RETRYABLE, backoff_s=0.001) == "requeued"
    job = load(store, job_id)
    assert (job.state, job.failures, job.error) == ("queued", 1, None)
    age(engine, job_id, 1, "run_after")
    lease = claim(store).lease
    assert lease.attempt == 2
    assert store.attempts.fail(lease, RETRYABLE, backoff_s=0.001) == "failed"
    job = load(store, job_id)
    assert (job.state, job.failures) == ("failed", 2)
    assert job.error == RETRYABLE.as_dict()
    with transaction(engine, read_only=True) as connection:
        kept = connection.execute(select(job_attempts.c.outcome, job_attempts.c.error)).all()
    assert [tuple(count) for count in kept] == [("failed", RETRYABLE.as_dict())] * 2
    kinds = [event.kind for event in store.reader.events(job_id)]
    assert kinds == ["queued", "started", "requeued", "started", "failed"]


def test_an_error_that_will_not_pass_fails_the_job_at_once(store: JobStore):
    job_id = submit(store)
    assert store.attempts.fail(claim(store).lease, FINAL, backoff_s=1) == "failed"
    assert load(store, job_id).failures == 1


def test_in_a_cancelling_job_only_an_error_that_will_not_pass_still_counts(store: JobStore):
    outcomes = []
    for error in (RETRYABLE, FINAL, NightpressError(ErrorCode.CANCELLED, "stopped")):
        job_id = submit(store)
        lease = claim(store).lease
        store.requests.request_cancel(TENANT, job_id)
        outcomes.append(store.attempts.fail(lease, error, backoff_s=1))
    assert outcomes == ["cancelled", "failed", "cancelled"]


@pytest.mark.parametrize("failures", [0, 1, 4, 19])
def test_the_pause_doubles_with_jitter_and_has_a_bound(store: JobStore, engine: Engine, failures: int):
    job_id = submit(store, max_failures=20 + failures)
    for _ in range(failures):
        store.attempts.fail(claim(store).lease, RETRYABLE, backoff_s=0.0)
        age(engine, job_id, 1, "run_after")
    claimed = claim(store)
    store.attempts.fail(claimed.lease, RETRYABLE, backoff_s=5.0)
    job = load(store, job_id)
    assert claimed.job.started_at is not None
    pause = (job.run_after - claimed.job.started_at).total_seconds()
    whole = min(600.0, 5.0 * 2**failures)
    assert whole / 2 <= pause <= whole + 5
    assert store.claims.claim(offer("worker-2"), ttl_s=60) is None


def test_draining_counts_no_failure_and_lets_another_worker_start_at_once(store: JobStore):
    job_id = submit(store)
    assert store.attempts.release(claim(store).lease)
    job = load(store, job_id)
    assert (job.state, job.failures, job.attempt) == ("queued", 0, 1)
    claimed = claim(store, "worker-2")
    assert (claimed.job.id, claimed.lease.attempt) == (job_id, 2)


def test_a_zombie_can_do_nothing_after_its_job_went_to_another_worker(store: JobStore, engine: Engine):
    job_id = submit(store)
    zombie = claim(store, "worker-1").lease
    age(engine, job_id, 100, "lease_expires_at")
    assert store.expiry.expire_leases(backoff_s=0.0) == [job_id]
    age(engine, job_id, 1, "run_after")
    heir = claim(store, "worker-2").lease
    before = everything(engine, job_id)
    progress = Progress(phase="uploading", fraction=0.99)
    assert not store.attempts.renew(zombie, ttl_s=60, progress=progress).held
    assert not store.attempts.append_logs(zombie, [("info", "still here")])
    assert not store.attempts.record_event(zombie, "checkpoint", {})
    assert not store.attempts.finish(zombie, succeeded(zombie))
    assert store.attempts.fail(zombie, RETRYABLE, backoff_s=1) is None
    assert not store.attempts.release(zombie)
    store.requests.request_cancel(TENANT, job_id)
    assert not store.attempts.confirm_cancelled(zombie)
    assert everything(engine, job_id)[1] == before[1] + 1, "only the cancellation left an event"
    assert store.reader.logs(job_id) == []
    assert store.reader.artifacts(job_id) == []
    assert store.attempts.finish(heir, succeeded(heir)), "who finishes before the kill has finished"


def test_a_renewal_touches_no_index(store: JobStore, engine: Engine):
    """A running job is renewed every two seconds for hours. PostgreSQL must update it in the same page, without its ten indexes (HOT)."""
    if engine.dialect.name == "sqlite":
        pytest.skip("SQLite writes in place")
    submit(store)
    lease = claim(store).lease
    for step in range(20):
        assert store.attempts.renew(lease, ttl_s=60, progress=Progress(phase="pressing", fraction=step / 20)).held
    engine.dispose()  # a connection reports its statistics when it ends
    ask = text("SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'jobs'")

    def counted() -> tuple[int, int] | None:
        with transaction(engine, read_only=True) as connection:
            row = connection.execute(ask).one()
        return tuple(row) if row[0] >= 21 else None

    assert eventually(counted) == (21, 20), "all but the claim"


def test_progress_never_falls_within_an_attempt_and_starts_anew_with_the_next(store: JobStore):
    job_id = submit(store)
    lease = claim(store).lease
    store.attempts.renew(
        lease, ttl_s=60, progress=Progress(phase="pressing", fraction=0.5, pass_index=1, message="m", eta_s=9.0)
    )
    store.attempts.renew(lease, ttl_s=60, progress=Progress(phase="exporting", fraction=0.4))
    job = load(store, job_id)
    assert (job.phase, job.progress, job.pass_index, job.eta_s) == ("exporting", 0.5, None, None)
    store.attempts.release(lease)
    claim(store)
    assert load(store, job_id).progress == 0.0


def test_finishing_writes_artifacts_report_and_figures_with_the_state(store: JobStore, engine: Engine):
    job_id = submit(store)
    lease = claim(store).lease
    assert store.reader.report(job_id) is None
    assert store.attempts.finish(lease, succeeded(lease))
    job = load(store, job_id)
    assert (job.state, job.verdict, job.progress, job.phase) == ("succeeded", "accepted", 1.0, None)
    (artifact,) = store.reader.artifacts(job_id)
    assert (artifact.format, artifact.attempt, artifact.size) == ("safetensors", 1, 3)
    assert store.reader.report(job_id) == {"schema_version": 1, "verdict": "accepted"}
    assert store.reader.events(job_id)[-1].data == {"attempt": 1, "verdict": "accepted"}
    assert everything(engine, job_id)[-1] == ((1, "succeeded"),)


def test_a_finish_that_cannot_be_written_whole_changes_nothing(store: JobStore, engine: Engine):
    job_id = submit(store)
    lease = claim(store).lease
    outcome = succeeded(lease)
    twice = outcome.manifest.model_copy(update={"artifacts": outcome.manifest.artifacts * 2})
    before = everything(engine, job_id)
    with pytest.raises(Exception, match=r"(?i)unique"):
        store.attempts.finish(lease, replace(outcome, manifest=twice))
    assert everything(engine, job_id) == before
    assert store.attempts.finish(lease, outcome)


def test_another_attempts_manifest_is_refused(store: JobStore):
    submit(store)
    lease = claim(store).lease
    with pytest.raises(ValueError, match="attempt 2"):
        store.attempts.finish(lease, succeeded(replace(lease, attempt=2)))


def test_a_cancelled_request_is_seen_at_the_next_renewal(store: JobStore):
    job_id = submit(store)
    lease = claim(store).lease
    assert store.attempts.renew(lease, ttl_s=60) == (True, False)
    store.requests.request_cancel(TENANT, job_id)
    assert store.attempts.renew(lease, ttl_s=60) == (True, True)
    assert store.attempts.release(lease)
    assert load(store, job_id).state == "cancelled", "a job that someone wants gone is not given to the next worker"


def test_another_tenants_job_can_neither_be_seen_nor_cancelled(store: JobStore):
    job_id = submit(store)
    assert store.reader.get("stranger", job_id) is None
    assert store.requests.request_cancel("stranger", job_id) is None
    assert load(store, job_id).state == "queued"


def test_only_a_result_of_the_same_engine_is_reused(store: JobStore, monkeypatch: pytest.MonkeyPatch):
    """In a rolling upgrade an older worker may have made the result."""
    with monkeypatch.context() as older:
        older.setattr(nightpress.core.service.jobs.attempts, "ENGINE", "older/1")
        old = submit(store, fingerprint="same")
        lease = claim(store).lease
        assert store.attempts.finish(lease, succeeded(lease))
    new = submit(store, fingerprint="same")
    assert store.requests.reuse(load(store, new)).state == "queued"
    lease = claim(store).lease
    assert store.attempts.finish(lease, succeeded(lease))
    again = submit(store, fingerprint="same")
    assert store.requests.reuse(load(store, again)).reused_from == new != old


def test_a_job_of_which_nothing_is_known_is_given_no_result(store: JobStore):
    submit(store)
    lease = claim(store).lease
    assert store.attempts.finish(lease, succeeded(lease))
    assert store.requests.reuse(load(store, submit(store))).state == "queued"
