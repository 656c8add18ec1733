"""Claims on a host with several GPUs: which GPUs a job gets, what runs at a time, and that large jobs are not starved."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine, select

from nightpress.core.database import transaction
from nightpress.core.service.jobs.claim_statements import HELD_BACK_S, Caps
from nightpress.core.service.jobs.records import NOT_FOR_OLD_WORKERS, Claimed, OfferedGpu, WorkerOffer
from nightpress.core.service.jobs.store import JobStore
from nightpress.core.service.tables.jobs import job_attempts, jobs
from tests.jobs import GB, age, gpus, host, load, offer, submit, succeeded

pytestmark = pytest.mark.usefixtures("store")  # tests that make their own store need its model too


def take(store: JobStore, of: WorkerOffer) -> Claimed:
    claimed = store.claims.claim(of, ttl_s=60)
    assert claimed is not None
    return claimed


def uuids(claimed: Claimed) -> list[str]:
    return [gpu.uuid for gpu in claimed.share.gpus]


def finish(store: JobStore, claimed: Claimed) -> None:
    assert store.attempts.finish(claimed.lease, succeeded(claimed.lease))


def on_gpus(store: JobStore, count: int = 1, **changes: object) -> str:
    return submit(store, queue="gpu", needs_gpus=count, **changes)


def test_jobs_run_side_by_side_on_gpus_of_their_own(store: JobStore, engine: Engine):
    on_two, on_single, on_two_later = on_gpus(store, 2), on_gpus(store), on_gpus(store, 2)
    taken = [take(store, host(count=4)) for _ in range(2)]
    assert [claimed.job.id for claimed in taken] == [on_two, on_single]
    assert [uuids(claimed) for claimed in taken] == [["GPU-HBM3-0", "GPU-HBM3-1"], ["GPU-HBM3-2"]]
    assert store.claims.claim(host(count=4), ttl_s=60) is None, "one GPU is free, and the next job needs two"
    finish(store, taken[0])
    third = take(store, host(count=4))
    assert (third.job.id, uuids(third)) == (on_two_later, ["GPU-HBM3-0", "GPU-HBM3-1"])
    with transaction(engine, read_only=True) as connection:
        query = select(job_attempts.c.gpus).where(job_attempts.c.job_id == on_single)
        [held] = connection.execute(query).scalar_one()
    assert held == {"uuid": "GPU-HBM3-2", "name": "NVIDIA H100 80GB HBM3", "memory": 80 * GB}
    [_, started] = store.reader.events(on_single)
    assert started.data == {"attempt": 1, "worker_id": "host-1", "gpus": ["GPU-HBM3-2"]}


def test_a_job_gets_its_share_of_memory_and_threads(store: JobStore):
    for count, needs in ((1, 30 * GB), (1, GB), (2, GB)):
        on_gpus(store, count, needs_memory=needs)
    large, small, double = (take(store, host(count=4)).share for _ in range(3))
    assert large.memory == 30 * GB, "more than a quarter, since it needs more"
    assert small.memory == 34 * GB // 3
    assert double.memory == 34 * GB - small.memory
    assert [share.threads for share in (large, small, double)] == [4, 4, 8]


def test_a_worker_with_one_gpu_gives_its_job_all_that_it_has(store: JobStore):
    on_gpus(store)
    on_gpus(store)
    share = take(store, host(count=1)).share
    assert (share.memory, share.threads, len(share.gpus)) == (64 * GB, 16, 1)
    assert store.claims.claim(host(count=1), ttl_s=60) is None


def test_a_job_waits_for_the_memory_that_others_hold(store: JobStore):
    first = on_gpus(store, needs_memory=40 * GB)
    second = on_gpus(store, needs_memory=40 * GB)
    running = take(store, host(count=2))
    assert running.job.id == first
    assert store.claims.claim(host(count=2), ttl_s=60) is None
    finish(store, running)
    assert take(store, host(count=2)).job.id == second


def test_a_job_gets_the_smallest_gpu_that_suffices_and_never_two_kinds(store: JobStore):
    mixed = gpus(2, 80 * GB) + gpus(2, 24 * GB, "NVIDIA L4")
    small = take_one(store, mixed, needs_gpu_memory=10 * GB)
    assert uuids(small) == ["GPU-L4-0"]
    on_gpus(store, 3, needs_gpu_memory=10 * GB)
    assert store.claims.claim(host(gpus=mixed), ttl_s=60) is None
    large = take_one(store, mixed, needs_gpu_memory=40 * GB, priority=1)
    assert uuids(large) == ["GPU-HBM3-0"]


def test_instances_of_a_divided_gpu_run_one_job_each_and_never_one_job_together(store: JobStore):
    instances = tuple(OfferedGpu(f"MIG-{number}", "NVIDIA H100 MIG 1g.10gb", 10 * GB) for number in range(2))
    on_gpus(store, 2)
    assert store.claims.claim(host(gpus=instances), ttl_s=60) is None
    on_gpus(store, priority=1)
    on_gpus(store, priority=1)
    assert [uuids(take(store, host(gpus=instances))) for _ in range(2)] == [["MIG-0"], ["MIG-1"]]


def take_one(store: JobStore, offered: tuple[OfferedGpu, ...], **changes: object) -> Claimed:
    job_id = on_gpus(store, **changes)
    claimed = take(store, host(gpus=offered))
    assert claimed.job.id == job_id
    return claimed


def test_cpu_jobs_run_beside_only_where_the_worker_offers_that(store: JobStore):
    first, second = submit(store), submit(store)
    assert store.claims.claim(host(count=1), ttl_s=60) is None
    beside = take(store, host(count=1, cpu_jobs=1))
    assert (beside.job.id, beside.share.gpus, beside.share.memory) == (first, (), 32 * GB)
    assert store.claims.claim(host(count=1, cpu_jobs=1), ttl_s=60) is None, "it runs one at a time"
    on_gpu = on_gpus(store)
    assert take(store, host(count=1, cpu_jobs=1)).job.id == on_gpu
    finish(store, beside)
    assert take(store, host(count=1, cpu_jobs=1)).job.id == second


def test_a_gpu_that_the_worker_still_uses_is_not_given_away(store: JobStore):
    on_gpus(store)
    busy = frozenset({"GPU-HBM3-0"})
    claimed = store.claims.claim(host(count=2), ttl_s=60, in_use=busy)
    assert claimed is not None
    assert uuids(claimed) == ["GPU-HBM3-1"]


def test_a_killed_workers_gpus_come_back_with_its_lease(store: JobStore, engine: Engine):
    first, second = on_gpus(store, 4), on_gpus(store, 4)
    killed = take(store, host(count=4))
    assert store.claims.claim(host(count=4), ttl_s=60) is None
    age(engine, killed.job.id, 61, "lease_expires_at")
    assert store.claims.claim(host(count=4), ttl_s=60) is None, "only the control process ends a lease"
    assert store.expiry.expire_leases(backoff_s=0) == [first]
    taken = {take(store, host(count=4)).job.id, take(store, host("host-2", 4)).job.id}
    assert taken == {first, second}


# Large jobs ----------------------------------------------------------------------------------------------------------


def test_a_host_holds_gpus_back_for_the_oldest_large_job_of_the_highest_priority(store: JobStore, engine: Engine):
    running = [on_gpus(store) for _ in range(3)]
    taken = [take(store, host(count=4)) for _ in running]
    older = on_gpus(store)
    large = on_gpus(store, 4)
    younger = on_gpus(store)
    urgent = on_gpus(store, priority=1)
    # SQLite's clock has milliseconds, in which two jobs may be submitted.
    age(engine, older, 2, "created_at")
    age(engine, large, 1, "created_at")
    assert take(store, host(count=4)).job.id == urgent, "a higher priority goes first"
    finish(store, taken[0])
    assert take(store, host(count=4)).job.id == older
    finish(store, taken[1])
    assert store.claims.claim(host(count=4), ttl_s=60) is None, "what is younger waits"
    assert load(store, large).state == "queued"
    assert take(store, host("host-2", 1)).job.id == younger, "a host that can't hold the large job goes on"


def test_only_one_host_holds_back_for_a_job(store: JobStore, engine: Engine):
    for _ in range(2):
        on_gpus(store)
    busy = [take(store, host(f"host-{number}", 2)) for number in (1, 2)]
    large = on_gpus(store, 2)
    assert store.claims.claim(host("host-1", 2), ttl_s=60) is None
    small = on_gpus(store)
    assert take(store, host("host-2", 2)).job.id == small
    with transaction(engine, read_only=True) as connection:
        held = connection.execute(select(jobs.c.held_by).where(jobs.c.id == large)).scalar_one()
    assert held == "host-1"
    on_gpus(store)
    age(engine, large, HELD_BACK_S + 1, "held_until")
    finish(store, busy[1])
    assert store.claims.claim(host("host-2", 2), ttl_s=60) is None, "the other host takes over"
    assert take(store, host("host-1", 2)).job.id != large


def test_a_large_job_is_not_starved_by_a_stream_of_small_ones_of_another_tenant(store: JobStore):
    running = [take_one(store, gpus(4), tenant_id="many") for _ in range(4)]
    large = on_gpus(store, 4, tenant_id="many")
    for number, claimed in enumerate(running):  # each free GPU would else go to the tenant that has nothing running
        assert store.claims.claim(host(count=4), ttl_s=60) is None
        on_gpus(store, tenant_id=f"tenant-{number}")
        finish(store, claimed)
    assert take(store, host(count=4)).job.id == large


@pytest.mark.slow
def test_a_low_priority_small_job_gets_its_turn_behind_large_ones(engine: Engine):
    store = JobStore(engine, oldest_share=1.0)
    first = on_gpus(store, priority=-5)
    on_gpus(store, 2)
    running = take(store, host(count=2))
    assert running.job.id == first, "a claim for the oldest goes by age alone"
    second = on_gpus(store, priority=-5)
    assert store.claims.claim(host(count=2), ttl_s=60) is None, "it is younger than the job that GPUs are held back for"
    finish(store, running)
    finish(store, take(store, host(count=2)))
    assert take(store, host(count=2)).job.id == second


def test_nothing_is_held_back_for_a_tenant_without_quota(engine: Engine):
    store = JobStore(engine, Caps(running=1))
    mine = on_gpus(store, tenant_id="full")
    assert take(store, host(count=2)).job.id == mine
    on_gpus(store, 2, tenant_id="full")
    other = on_gpus(store, tenant_id="other")
    assert take(store, host(count=2)).job.id == other


def test_a_worker_from_before_recipes_had_gpus_gets_no_such_job(store: JobStore):
    """Its claim compares `needs_gpu_memory` with its GPU's bytes; ours takes the added number off again."""
    job_id = on_gpus(store, needs_gpu_memory=10 * GB + NOT_FOR_OLD_WORKERS)
    job = load(store, job_id)
    assert job.needs_gpu_memory > 2**61
    assert job.gpu_bytes == 10 * GB
    assert store.claims.claim(host(gpus=gpus(1, 8 * GB)), ttl_s=60) is None
    assert take(store, host(gpus=gpus(1, 24 * GB))).job.id == job_id


# Many at once --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_gpu_is_given_twice_and_all_are_busy(store: JobStore, engine: Engine):
    """Sixteen threads, with two stores as two processes have them, claim for one host until it is full; then its worker is killed."""
    for number in range(24):
        on_gpus(store, tenant_id=f"tenant-{number % 3}")
    stores = (store, JobStore(engine))
    offered = host(count=8)
    start = threading.Barrier(16)

    def work(number: int) -> list[Claimed]:
        mine: list[Claimed] = []
        start.wait()
        while (claimed := stores[number % 2].claims.claim(offered, ttl_s=600)) is not None:
            mine.append(claimed)
        return mine

    for _ in range(2):
        with ThreadPoolExecutor(16) as pool:
            taken = [claimed for mine in pool.map(work, range(16)) for claimed in mine]
        held = [uuid for claimed in taken for uuid in uuids(claimed)]
        assert sorted(held) == [gpu.uuid for gpu in offered.gpus], "each exactly once"
        for claimed in taken:
            age(engine, claimed.job.id, 601, "lease_expires_at")
        assert len(store.expiry.expire_leases(backoff_s=3600)) == 8
    assert store.claims.claim(offer("worker-1"), ttl_s=60) is None, "a CPU worker takes none of them"
