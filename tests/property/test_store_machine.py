"""The job store, compared with a simple model of it under any sequence of submissions, claims, crashes and cancellations."""

from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Engine, delete

from nightpress.core.database import metadata, transaction
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.service.jobs.records import Idempotency, Lease
from nightpress.core.service.jobs.states import is_terminal
from nightpress.core.service.jobs.store import JobStore
from tests.jobs import add_model, age, new_job, offer, succeeded

TENANTS = ("ada", "bob")
MAX_QUEUED = 4
RETRYABLE = NightpressError(ErrorCode.WORKER_LOST, "gone")
FINAL = NightpressError(ErrorCode.NUMERICAL_FAILURE, "not finite")


@dataclass
class ModelJob:
    """The expected state of one job."""

    tenant: str
    priority: int
    age: int
    max_failures: int
    fingerprint: str | None = None
    state: str = "queued"
    reused: bool = False
    failures: int = 0
    attempt: int = 0
    lease: str | None = None
    events: int = 1


@dataclass
class Model:
    """The expected state of the whole store: DESIGN §5 in plain Python."""

    jobs: dict[str, ModelJob] = field(default_factory=dict)
    keys: dict[tuple[str, str], str] = field(default_factory=dict)

    def queued(self, tenant: str) -> int:
        return sum(job.state == "queued" and job.tenant == tenant for job in self.jobs.values())

    def running(self, tenant: str) -> int:
        return sum(job.lease is not None and job.tenant == tenant for job in self.jobs.values())

    def best(self, *, oldest: bool) -> str | None:
        queued = {job_id: job for job_id, job in self.jobs.items() if job.state == "queued"}
        ranks = {
            job_id: (job.age,) if oldest else (-job.priority, self.running(job.tenant), job.age)
            for job_id, job in queued.items()
        }
        return min(ranks, key=ranks.__getitem__, default=None)

    def end(self, job_id: str, state: str, *, failed: bool = False) -> None:
        job = self.jobs[job_id]
        job.lease, job.state = None, state
        job.failures += failed
        job.events += 1

    def fail(self, job_id: str, *, final: bool) -> str:
        job = self.jobs[job_id]
        if job.state == "cancelling" and not final:
            self.end(job_id, "cancelled")
        elif final or job.failures + 1 >= job.max_failures:
            self.end(job_id, "failed", failed=True)
        else:
            self.end(job_id, "queued", failed=True)
        return job.state

    def gives(self, job_id: str) -> bool:
        """Whether an identical job of the tenant has succeeded with its own result, not a reused one."""
        mine = self.jobs[job_id]
        wanted = (mine.tenant, mine.fingerprint, "succeeded", False)
        return mine.fingerprint is not None and any(
            (job.tenant, job.fingerprint, job.state, job.reused) == wanted for job in self.jobs.values()
        )


class StoreMachine(RuleBasedStateMachine):
    """Runs random rules on the store and on the model. Lost leases stay in the bundle, so zombies try every rule too."""

    store: JobStore  #: set by the test
    leases = Bundle("leases")
    job_ids = Bundle("job_ids")

    def __init__(self) -> None:
        super().__init__()
        with transaction(self.store.engine) as connection:
            for table in reversed(metadata.sorted_tables):
                connection.execute(delete(table))
        add_model(self.store.engine)
        # A new store for each example, because a store keeps its tenants' quota allowances.
        self.store = JobStore(self.store.engine)
        self.for_the_oldest = JobStore(self.store.engine, oldest_share=1.0)
        self.model = Model()

    def _holds(self, lease: Lease) -> bool:
        return self.model.jobs[lease.job_id].lease == lease.lease_id

    @rule(
        target=job_ids,
        tenant=st.sampled_from(TENANTS),
        priority=st.integers(-1, 1),
        max_failures=st.integers(1, 3),
        key=st.none() | st.sampled_from(["k1", "k2"]),
        body=st.sampled_from(["b1", "b2"]),
        fingerprint=st.none() | st.sampled_from(["f1", "f2"]),
    )
    def submit(
        self, tenant: str, priority: int, max_failures: int, key: str | None, body: str, fingerprint: str | None
    ) -> str:
        known = self.model.keys.get((tenant, key or ""))
        expected = None
        if known is not None and known.split()[1] != body:
            expected = ErrorCode.IDEMPOTENCY_MISMATCH
        elif known is None and self.model.queued(tenant) >= MAX_QUEUED:
            expected = ErrorCode.QUOTA_EXCEEDED
        new = new_job(
            tenant_id=tenant,
            priority=priority,
            max_failures=max_failures,
            fingerprint=fingerprint,
            queue_limit_s=3600.0,
        )
        try:
            job, created = self.store.submission.submit(
                new, idempotency=Idempotency(key, body) if key else None, max_queued=MAX_QUEUED
            )
        except NightpressError as error:
            assert error.code is expected  # noqa: PT017 - the model decides which error is expected
            return ""
        assert expected is None
        assert created is (known is None)
        if not created:
            assert job.id == str(known).split()[0]
            return job.id
        self.model.jobs[job.id] = ModelJob(tenant, priority, len(self.model.jobs), max_failures, fingerprint)
        if key:
            self.model.keys[tenant, key] = f"{job.id} {body}"
        return job.id

    @rule(target=leases, worker=st.sampled_from(["w1", "w2"]), oldest=st.booleans())
    def claim(self, worker: str, oldest: bool) -> Lease:
        claimed = (self.for_the_oldest if oldest else self.store).claims.claim(offer(worker), ttl_s=60)
        best = self.model.best(oldest=oldest)
        assert (claimed.job.id if claimed else None) == best
        if claimed is None:
            return Lease("", "", 0, worker)
        job = self.model.jobs[claimed.job.id]
        job.state, job.lease = "running", claimed.lease.lease_id
        job.attempt += 1
        job.events += 1
        assert claimed.lease.attempt == job.attempt
        return claimed.lease

    @rule(lease=leases)
    def renew(self, lease: Lease) -> None:
        if lease.job_id:
            held = self._holds(lease)
            cancelling = held and self.model.jobs[lease.job_id].state == "cancelling"
            assert self.store.attempts.renew(lease, ttl_s=60) == (held, cancelling)

    @rule(lease=leases)
    def note(self, lease: Lease) -> None:
        if lease.job_id:
            held = self._holds(lease)
            assert self.store.attempts.record_event(lease, "checkpoint", {}) is held
            assert self.store.attempts.append_logs(lease, [("info", "line")]) is held
            self.model.jobs[lease.job_id].events += held

    @rule(lease=leases)
    def finish(self, lease: Lease) -> None:
        if lease.job_id:
            held = self._holds(lease)
            assert self.store.attempts.finish(lease, succeeded(lease)) is held
            if held:
                self.model.end(lease.job_id, "succeeded")

    @rule(lease=leases, final=st.booleans())
    def fail(self, lease: Lease, final: bool) -> None:
        if lease.job_id:
            held = self._holds(lease)
            answer = self.store.attempts.fail(lease, FINAL if final else RETRYABLE, backoff_s=0.0)
            expected = self.model.fail(lease.job_id, final=final) if held else None
            assert answer == ("requeued" if expected == "queued" else expected)
            self._pass_backoff(lease.job_id)

    @rule(lease=leases)
    def drain(self, lease: Lease) -> None:
        if lease.job_id:
            held = self._holds(lease)
            assert self.store.attempts.release(lease) is held
            if held:
                state = self.model.jobs[lease.job_id].state
                self.model.end(lease.job_id, "cancelled" if state == "cancelling" else "queued")
                self._pass_backoff(lease.job_id)

    @rule(job_id=job_ids, tenant=st.sampled_from(TENANTS))
    def cancel(self, job_id: str, tenant: str) -> None:
        expected = self.model.jobs.get(job_id)
        answer = self.store.requests.request_cancel(tenant, job_id)
        if expected is None or expected.tenant != tenant:
            assert answer is None
        elif expected.state == "queued":
            self.model.end(job_id, "cancelled")
        elif expected.state == "running":
            expected.state = "cancelling"
            expected.events += 1

    @rule(lease=leases)
    def confirm(self, lease: Lease) -> None:
        if lease.job_id:
            right = self._holds(lease) and self.model.jobs[lease.job_id].state == "cancelling"
            assert self.store.attempts.confirm_cancelled(lease) is right
            if right:
                self.model.end(lease.job_id, "cancelled")

    @rule(lease=consumes(leases))
    def lose_worker(self, lease: Lease) -> None:
        """The worker's lease runs out, and the control process looks for expired leases twice."""
        if lease.job_id and self._holds(lease):
            age(self.store.engine, lease.job_id, 100, "lease_expires_at")
            assert self.store.expiry.expire_leases(backoff_s=0.0) == [lease.job_id]
            self.model.fail(lease.job_id, final=False)
            self._pass_backoff(lease.job_id)
        assert self.store.expiry.expire_leases(backoff_s=0.0) == []

    @rule(lease=leases, clock=st.sampled_from(["progressed_at", "started_at"]))
    def overrun(self, lease: Lease, clock: str) -> None:
        """A run stalls or passes its limit, and its worker doesn't stop it."""
        if lease.job_id and self._holds(lease):
            age(self.store.engine, lease.job_id, 10**6, clock)
            assert self.store.expiry.expire_leases(backoff_s=0.0) == [lease.job_id]
            cancelling = self.model.jobs[lease.job_id].state == "cancelling"
            self.model.fail(lease.job_id, final=clock == "started_at" and not cancelling)
            self._pass_backoff(lease.job_id)

    @rule(job_id=job_ids)
    def wait_too_long(self, job_id: str) -> None:
        """A job's queue deadline passes. The deadline applies only until the first start."""
        if job_id:
            job = self.model.jobs[job_id]
            due = job.state == "queued" and job.attempt == 0
            if due:
                age(self.store.engine, job_id, 7200, "start_before")
            assert self.store.expiry.expire_queue_deadlines() == [job_id] * due
            if due:
                self.model.end(job_id, "failed")

    @rule(job_id=job_ids)
    def reuse(self, job_id: str) -> None:
        if job_id:
            mine = self.model.jobs[job_id]
            job = self.store.reader.get(mine.tenant, job_id)
            assert job is not None
            given = mine.state == "queued" and self.model.gives(job_id)
            assert (self.store.requests.reuse(job).reused_from is not None) is (given or mine.reused)
            if given:
                mine.reused = True
                self.model.end(job_id, "succeeded")

    @precondition(lambda self: any(job.state == "queued" for job in self.model.jobs.values()))
    @rule()
    def look_at_the_queue(self) -> None:
        assert self.store.reader.queues_with_work() == {"cpu": sum(map(self.model.queued, TENANTS))}

    def _pass_backoff(self, job_id: str) -> None:
        age(self.store.engine, job_id, 1, "run_after")

    @invariant()
    def the_store_is_as_the_model_says(self) -> None:
        for tenant in TENANTS:
            page, _ = self.store.reader.page(tenant, limit=200)
            expected = {job_id: job for job_id, job in self.model.jobs.items() if job.tenant == tenant}
            assert [job.id for job in page] == list(expected)[::-1]
            for job in page:
                record = expected[job.id]
                assert (job.state, job.failures, job.attempt, job.lease_id) == (
                    record.state,
                    record.failures,
                    record.attempt,
                    record.lease,
                )
                assert job.failures <= job.max_failures

    def teardown(self) -> None:
        for job_id, job in self.model.jobs.items():
            events = self.store.reader.events(job_id)
            assert [event.seq for event in events] == list(range(1, job.events + 1))
            ends = [event for event in events if event.kind in {"succeeded", "failed", "cancelled"}]
            assert len(ends) == is_terminal(job.state)
            assert bool(self.store.reader.artifacts(job_id)) == (job.state == "succeeded")


@pytest.fixture
def store(engine: Engine) -> JobStore:
    """A store on an empty database: the state machine adds the model."""
    return JobStore(engine)


@pytest.mark.slow
def test_no_sequence_of_calls_leaves_the_model(store: JobStore):
    machine = type("BoundStoreMachine", (StoreMachine,), {"store": store})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=40,
            stateful_step_count=30,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )
