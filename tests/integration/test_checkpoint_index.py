"""Who may write a prefix of checkpoints, how much, and when it is deleted."""

import pytest
from sqlalchemy import Engine, update

from nightpress.core.database import db_now, transaction
from nightpress.core.service.jobs.checkpoints import CheckpointIndex, StoredFile
from nightpress.core.service.jobs.records import Lease
from nightpress.core.service.jobs.store import JobStore
from nightpress.core.service.tables.jobs import checkpoints
from tests.jobs import age, claim, submit

DIGEST = "d" * 64


@pytest.fixture
def index(engine: Engine) -> CheckpointIndex:
    return CheckpointIndex(engine)


def leased(store: JobStore) -> Lease:
    submit(store)
    return claim(store).lease


def file(lease: Lease, path: str = "a", size: int = 10) -> StoredFile:
    return StoredFile(path, size, "e" * 64, 1, lease.job_id)


@pytest.mark.slow
def test_one_attempt_at_a_time_writes_a_prefix_and_others_read_it(store: JobStore, index: CheckpointIndex):
    first, second = leased(store), leased(store)
    assert index.take(first, DIGEST)
    assert not index.take(second, DIGEST)
    assert index.add(first, DIGEST, file(first), limit=100)
    assert not index.add(second, DIGEST, file(second, "b"), limit=100)
    assert set(index.files(DIGEST)) == {"a"}
    store.attempts.release(first)
    assert index.take(second, DIGEST), "who has it gave up"
    assert index.add(second, DIGEST, file(second, "b"), limit=100)


def test_a_zombie_adds_nothing(store: JobStore, engine: Engine, index: CheckpointIndex):
    zombie = leased(store)
    assert index.take(zombie, DIGEST)
    age(engine, zombie.job_id, 100, "lease_expires_at")
    assert store.expiry.expire_leases(backoff_s=0.0)
    assert not index.add(zombie, DIGEST, file(zombie), limit=100)
    age(engine, zombie.job_id, 1, "run_after")
    after = claim(store).lease
    assert index.take(after, DIGEST)
    assert not index.add(zombie, DIGEST, file(zombie), limit=100)
    assert index.files(DIGEST) == {}


def test_a_prefix_has_a_bound_in_which_a_replaced_file_counts_once(store: JobStore, index: CheckpointIndex):
    lease = leased(store)
    index.take(lease, DIGEST)
    assert index.add(lease, DIGEST, file(lease, size=60), limit=100)
    assert index.add(lease, DIGEST, file(lease, size=90), limit=100)
    assert not index.add(lease, DIGEST, file(lease, "b", size=20), limit=100)
    index.forget(DIGEST, ["a"])
    assert index.add(lease, DIGEST, file(lease, "b", size=20), limit=100)


def test_only_what_nobody_needs_or_used_lately_is_due(store: JobStore, engine: Engine, index: CheckpointIndex):
    lease = leased(store)
    index.take(lease, DIGEST)
    index.add(lease, DIGEST, file(lease), limit=100)

    def let_time_pass() -> None:
        with transaction(engine) as connection:
            connection.execute(update(checkpoints).values(used_at=db_now(-100.0)))

    let_time_pass()
    assert index.due(60.0) == [], "its job runs"
    store.requests.request_cancel("default", lease.job_id)
    store.attempts.confirm_cancelled(lease)
    assert index.due(600.0) == []
    assert index.due(60.0) == [DIGEST]
    other = leased(store)
    index.take(other, DIGEST)
    index.prune(DIGEST, 60.0)
    assert set(index.files(DIGEST)) == {"a"}, "somebody took it up meanwhile"
    store.attempts.release(other)
    store.requests.request_cancel("default", other.job_id)
    let_time_pass()
    index.prune(DIGEST, 60.0)
    assert index.files(DIGEST) == {}
