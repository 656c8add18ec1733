"""Submitting jobs: quota, idempotency, and the resulting row."""

import datetime as dt
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from sqlalchemy import Engine, func, select

from nightpress.core.database import transaction
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.service.jobs.records import Idempotency
from nightpress.core.service.jobs.store import JobStore
from nightpress.core.service.tables.jobs import job_events, jobs
from tests.jobs import claim, new_job, submit

pytestmark = pytest.mark.usefixtures("store")  # tests that make their own store need its model too


def count(engine: Engine) -> tuple[int, int]:
    with transaction(engine, read_only=True) as connection:
        return tuple(
            connection.execute(select(func.count()).select_from(table)).scalar_one() for table in (jobs, job_events)
        )


def test_the_answer_is_the_row(store: JobStore):
    job, created = store.submission.submit(
        new_job(name="nightly", labels={"team": "search"}, priority=-3, queue_limit_s=60.0), max_queued=10
    )
    assert created
    assert job == store.reader.get("default", job.id)
    (event,) = store.reader.events(job.id)
    assert (event.seq, event.kind) == (1, "queued")


def test_a_job_for_later_keeps_its_time(store: JobStore, engine: Engine):
    later = dt.datetime.now(dt.UTC).replace(microsecond=0) + dt.timedelta(hours=3)
    job, _ = store.submission.submit(new_job(run_after=later, queue_limit_s=60.0), max_queued=10)
    assert job.run_after == later
    with transaction(engine, read_only=True) as connection:
        deadline = connection.execute(select(jobs.c.start_before)).scalar_one()
    assert deadline == later + dt.timedelta(seconds=60), "its queue limit runs from then"
    past, _ = store.submission.submit(
        new_job(run_after=later - dt.timedelta(days=9), queue_limit_s=60.0), max_queued=10
    )
    assert store.expiry.expire_queue_deadlines() == []
    assert claim(store).job.id == past.id


@pytest.mark.parametrize("max_queued", [1, 3, 10])
def test_the_quota_is_the_number_of_queued_jobs(store: JobStore, engine: Engine, max_queued: int):
    for _ in range(max_queued):
        store.submission.submit(new_job(), max_queued=max_queued)
    for key in (None, Idempotency("k", "f")):
        with pytest.raises(NightpressError) as raised:
            store.submission.submit(new_job(), idempotency=key, max_queued=max_queued)
        assert raised.value.code is ErrorCode.QUOTA_EXCEEDED
    assert count(engine) == (max_queued, max_queued), "what is refused leaves nothing behind"
    store.submission.submit(new_job(tenant_id="another"), max_queued=max_queued)
    claim(store)
    store.submission.submit(new_job(), max_queued=max_queued)


def test_a_burst_of_submissions_stays_within_the_quota(store: JobStore, engine: Engine):
    def submit_one(_: int) -> bool:
        try:
            store.submission.submit(new_job(), max_queued=50)
        except NightpressError as error:
            if error.code is not ErrorCode.QUOTA_EXCEEDED:
                raise
            return False
        return True

    for index in range(40):
        assert submit_one(index)
    with ThreadPoolExecutor(4) as pool:
        accepted = sum(pool.map(submit_one, range(40)))
    assert accepted == 10
    assert not submit_one(0)


@pytest.mark.parametrize("max_queued", [3, 2100])
@pytest.mark.slow
def test_counts_at_the_same_moment_never_pass_the_quota(engine: Engine, max_queued: int):
    """Eight stores, each with its own gauge, submit for one tenant as fast as they can, single jobs and batches."""
    stores = [JobStore(engine) for _ in range(8)]
    stores[0].submission.submit_all([new_job() for _ in range(max_queued - 3)] or [new_job()], max_queued=max_queued)
    start = threading.Barrier(8)

    def fill(store: JobStore) -> None:
        start.wait()
        for index in range(4):
            with suppress(NightpressError):
                if index % 2:
                    store.submission.submit_all([new_job(), new_job()], max_queued=max_queued)
                else:
                    store.submission.submit(
                        new_job(), idempotency=Idempotency(f"{id(store)} {index}", "f"), max_queued=max_queued
                    )

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(fill, stores))
    assert count(engine)[0] == max_queued


@pytest.mark.slow
def test_far_from_the_quota_a_process_is_allowed_few_submissions_uncounted(engine: Engine):
    """Only submissions under an allowance that a process got shortly before can exceed the quota."""
    allowed, other = JobStore(engine), JobStore(engine)
    for _ in range(10):
        allowed.submission.submit(new_job(), max_queued=2100)
    other.submission.submit_all([new_job() for _ in range(2090)], max_queued=2100)
    with pytest.raises(NightpressError):
        other.submission.submit(new_job(), max_queued=2100)
    for _ in range(64):  # the largest allowance of a process
        with suppress(NightpressError):
            allowed.submission.submit(new_job(), max_queued=2100)
    with pytest.raises(NightpressError):
        allowed.submission.submit(new_job(), max_queued=2100)
    assert count(engine)[0] <= 2100 + 64


def test_the_same_key_and_body_give_the_same_job(store: JobStore, engine: Engine):
    key = Idempotency("nightly", "body")
    first, created = store.submission.submit(new_job(), idempotency=key, max_queued=10)
    again, created_again = store.submission.submit(new_job(), idempotency=key, max_queued=10)
    assert (created, created_again) == (True, False)
    assert again == first
    assert store.submission.replay("default", key) == first
    assert count(engine) == (1, 1)


def test_a_key_answers_also_where_the_quota_is_used_up(store: JobStore):
    key = Idempotency("nightly", "body")
    first, _ = store.submission.submit(new_job(), idempotency=key, max_queued=1)
    assert store.submission.submit(new_job(), idempotency=key, max_queued=1) == (first, False)


def test_the_same_key_with_another_body_is_refused(store: JobStore, engine: Engine):
    store.submission.submit(new_job(), idempotency=Idempotency("nightly", "body"), max_queued=10)
    with pytest.raises(NightpressError) as raised:
        store.submission.submit(new_job(), idempotency=Idempotency("nightly", "another"), max_queued=10)
    assert raised.value.code is ErrorCode.IDEMPOTENCY_MISMATCH
    assert count(engine) == (1, 1)


def test_a_key_is_one_tenants_own(store: JobStore):
    key = Idempotency("nightly", "body")
    mine, _ = store.submission.submit(new_job(), idempotency=key, max_queued=10)
    theirs, created = store.submission.submit(new_job(tenant_id="another"), idempotency=key, max_queued=10)
    assert created
    assert mine.id != theirs.id


def test_many_at_once_with_one_key_make_one_job(store: JobStore, engine: Engine):
    start = threading.Barrier(8)

    def submit_one(_: int) -> tuple[str, bool]:
        start.wait()
        job, created = store.submission.submit(new_job(), idempotency=Idempotency("nightly", "body"), max_queued=100)
        return job.id, created

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(submit_one, range(8)))
    assert len({job_id for job_id, _ in answers}) == 1
    assert sum(created for _, created in answers) == 1
    assert count(engine) == (1, 1)


def test_a_model_that_is_not_there_is_refused_by_the_database(store: JobStore, engine: Engine):
    with pytest.raises(Exception, match=r"(?i)foreign key"):
        store.submission.submit(new_job(model_id="model_gone"), max_queued=10)
    assert count(engine) == (0, 0)


def test_text_that_postgresql_cannot_keep_is_mended(store: JobStore):
    job_id = submit(store, name="a\0b", labels={"k": "\ud800"})
    job = store.reader.get("default", job_id)
    assert job is not None
    assert job.name == "a\ufffdb"
    assert job.labels == {"k": "?"}
