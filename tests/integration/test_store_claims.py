"""Which worker claims which job: order, fairness, fit, and many workers at once."""

import datetime as dt
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine

from nightpress.core.service.jobs.claim_statements import Caps
from nightpress.core.service.jobs.records import Lease
from nightpress.core.service.jobs.store import JobStore
from tests.jobs import GB, claim, gpus, host, offer, submit, succeeded

pytestmark = pytest.mark.usefixtures("store")  # tests that make their own store need its model too


def order(store: JobStore, count: int) -> list[str]:
    return [claim(store, f"worker-{index}").job.id for index in range(count)]


def test_higher_priority_goes_first_and_then_age(store: JobStore):
    first, second = submit(store), submit(store)
    urgent, idle = submit(store, priority=5), submit(store, priority=-5)
    assert order(store, 4) == [urgent, first, second, idle]
    assert store.claims.claim(offer(), ttl_s=60) is None


def test_the_tenant_with_the_fewest_running_goes_first(store: JobStore):
    many = [submit(store, tenant_id="many") for _ in range(4)]
    few = [submit(store, tenant_id="few") for _ in range(2)]
    first = [submit(store, tenant_id="one")]
    assert order(store, 7) == [many[0], few[0], first[0], many[1], few[1], many[2], many[3]]


def test_priority_outranks_fairness(store: JobStore):
    submit(store, tenant_id="few")
    urgent = [submit(store, tenant_id="many", priority=1) for _ in range(2)]
    assert order(store, 2) == urgent


def test_a_claim_for_the_oldest_passes_over_priorities_and_fairness_but_not_over_fit(engine: Engine):
    submit(JobStore(engine), needs_memory=100 * GB)
    store = JobStore(engine, oldest_share=1.0)
    first = submit(store, tenant_id="many", priority=-5)
    second = submit(store, tenant_id="many", priority=5)
    third = submit(store, tenant_id="few", priority=-5)
    fourth = submit(store, tenant_id="many", priority=-5)
    assert order(store, 4) == [first, second, third, fourth]
    assert store.claims.claim(offer(), ttl_s=60) is None


def test_a_claim_for_the_oldest_keeps_to_quotas(engine: Engine):
    store = JobStore(engine, Caps(running=1), oldest_share=1.0)
    full = [submit(store, tenant_id="full") for _ in range(2)]
    other = submit(store, tenant_id="other")
    assert order(store, 2) == [full[0], other]
    assert store.claims.claim(offer(), ttl_s=60) is None


@pytest.mark.slow
def test_a_low_priority_is_served_however_much_of_a_higher_one_keeps_coming(engine: Engine):
    store = JobStore(engine, oldest_share=1 / 8)
    waiting = submit(store, priority=-100)
    for _ in range(200):  # the probability that none of 200 claims takes the oldest job is 2.5e-12
        submit(store, priority=100)
        lease = claim(store).lease
        store.attempts.finish(lease, succeeded(lease))
        if lease.job_id == waiting:
            return
    pytest.fail("it starved")


def test_what_is_running_counts_until_it_ends(store: JobStore):
    a = [submit(store, tenant_id="a") for _ in range(3)]
    running = claim(store).lease
    b = [submit(store, tenant_id="b") for _ in range(1)]
    store.attempts.finish(running, succeeded(running))
    assert order(store, 3) == [a[1], b[0], a[2]], "the finished job of a weighs nothing any more"


def test_a_job_that_does_not_fit_holds_up_no_other(store: JobStore):
    large = submit(store, needs_memory=100 * GB, priority=9)
    small = submit(store, needs_memory=GB)
    assert claim(store).job.id == small
    assert store.claims.claim(offer(), ttl_s=60) is None
    large_offer = store.claims.claim(offer(memory=100 * GB), ttl_s=60)
    assert large_offer is not None
    assert large_offer.job.id == large


@pytest.mark.slow
def test_a_worker_takes_from_its_own_queue_alone(store: JobStore):
    submit(store, queue="gpu")
    assert store.claims.claim(offer(), ttl_s=60) is None
    assert store.claims.claim(host(), ttl_s=60) is not None


def test_a_job_for_later_waits(store: JobStore):
    later = dt.datetime.now(dt.UTC) + dt.timedelta(hours=1)
    submit(store, run_after=later, priority=100)
    assert store.claims.claim(offer(), ttl_s=60) is None
    assert store.reader.queues_with_work() == {}
    now = submit(store)
    assert store.reader.queues_with_work() == {"cpu": 1}
    assert claim(store).job.id == now


@pytest.mark.slow
def test_eight_workers_share_two_hundred_jobs_and_none_gets_one_twice(store: JobStore, engine: Engine):
    submitted = {submit(store, tenant_id=f"tenant-{index % 3}") for index in range(200)}
    start = threading.Barrier(8)

    def work(number: int) -> list[tuple[str, int]]:
        mine = []
        start.wait()
        while (claimed := store.claims.claim(offer(f"worker-{number}"), ttl_s=600)) is not None:
            mine.append((claimed.job.id, claimed.lease.attempt))
        return mine

    with ThreadPoolExecutor(8) as pool:
        taken = [job for mine in pool.map(work, range(8)) for job in mine]
    assert Counter(attempt for _, attempt in taken) == {1: 200}
    assert len({job_id for job_id, _ in taken}) == 200
    assert {job_id for job_id, _ in taken} == submitted


def test_a_worker_that_comes_while_others_claim_is_not_sent_away(store: JobStore):
    for _ in range(8):
        submit(store)
    start = threading.Barrier(8)

    def once(number: int) -> bool:
        start.wait()
        return store.claims.claim(offer(f"worker-{number}"), ttl_s=600) is not None

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(once, range(8)))


@pytest.mark.slow
def test_two_racing_ends_of_one_attempt_have_one_winner(store: JobStore):
    for _ in range(10):
        job_id = submit(store)
        lease = claim(store).lease
        start = threading.Barrier(3)

        def finish(_start: threading.Barrier = start, _lease: Lease = lease) -> bool:
            _start.wait()
            return store.attempts.finish(_lease, succeeded(_lease))

        def release(_start: threading.Barrier = start, _lease: Lease = lease) -> bool:
            _start.wait()
            return store.attempts.release(_lease)

        def cancel(_start: threading.Barrier = start, _job_id: str = job_id) -> bool:
            _start.wait()
            store.requests.request_cancel("default", _job_id)
            return False

        with ThreadPoolExecutor(3) as pool:
            won = [future.result() for future in [pool.submit(step) for step in (finish, release, cancel)]]
        assert sum(won) == 1
        kinds = [event.kind for event in store.reader.events(job_id)]
        assert sum(kind in {"succeeded", "cancelled", "failed"} for kind in kinds) <= 1
        assert [event.seq for event in store.reader.events(job_id)] == list(range(1, len(kinds) + 1))
        store.requests.request_cancel("default", job_id)


def test_a_gpu_takes_no_job_that_needs_more_memory_than_it_has(store: JobStore):
    large = submit(store, queue="gpu", needs_gpu_memory=40 * GB)
    small = submit(store, queue="gpu", needs_gpu_memory=10 * GB)
    taken = store.claims.claim(host(gpus=gpus(1, 24 * GB)), ttl_s=60)
    assert taken is not None
    assert taken.job.id == small
    assert store.claims.claim(host("host-2", gpus=gpus(1, 24 * GB)), ttl_s=60) is None
    larger = store.claims.claim(host("host-3", gpus=gpus(1, 48 * GB)), ttl_s=60)
    assert larger is not None
    assert larger.job.id == large


def test_a_claim_asks_once_whether_claims_must_go_one_after_another(store: JobStore, monkeypatch: pytest.MonkeyPatch):
    """Two calls may return different answers, and a lock that is taken outside a transaction has no effect."""
    submit(store)
    asked = store.claims._is_capped
    answers: list[bool] = []
    monkeypatch.setattr(store.claims, "_is_capped", lambda: answers.append(asked()) or answers[-1])
    claim(store)
    assert len(answers) <= 1
