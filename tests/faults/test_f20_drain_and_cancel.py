"""F18, F19, F20, F21: children that stall; deadlines; deploys and cancellations at any time."""

import random
import threading
import time

import pytest

from tests.patience import slowness
from tests.service import Service, eventually, pids_said, running


def test_f18_a_wedged_child_is_stopped_and_its_job_tried_again(service: Service) -> None:
    slot, _ = service.slot("wedged")
    job_id = service.submit(stall_s=1.0, max_failures=2)
    eventually(lambda: slot.serve() or service.job(job_id).state == "failed")
    job = service.job(job_id)
    assert job.error is not None
    assert (job.error["code"], job.attempt) == ("stalled", 2)
    service.check_invariants(job_id)


def test_f19_a_job_that_waited_too_long_fails_without_ever_running(service: Service) -> None:
    service.start_control()
    job_id = service.submit(queue_limit_s=0.5)
    job = service.await_state(job_id, "failed")
    assert job.error is not None
    assert (job.error["code"], job.attempt) == ("queue_deadline_exceeded", 0)
    service.check_invariants(job_id)


def test_f20_a_worker_told_to_end_gives_its_job_back_and_a_peer_takes_it(service: Service) -> None:
    worker = service.start_worker("first_slow")
    job_id = service.submit_and_ring()
    said = pids_said(service.await_log(job_id, "consumer"))
    service.start_worker("first_slow")
    told = time.monotonic()
    worker.terminate()
    assert worker.wait(10 * slowness()) == 0
    assert time.monotonic() - told < 10 * slowness()
    assert not running(said)
    service.ring()  # as the control process does at its next tick
    job = service.await_state(job_id, "succeeded", within=15)
    assert (job.attempt, job.failures) == (2, 0), "a deploy is no failure"
    kinds = service.kinds(job_id)
    assert (kinds.count("started"), kinds.count("released"), kinds.count("succeeded")) == (2, 1, 1)
    assert len(service.store.roster.workers()) == 1, "it said good-bye"
    service.check_invariants(job_id)


def test_f20_an_idle_worker_ends_at_once(service: Service) -> None:
    worker = service.start_worker("press")
    eventually(lambda: "serves cpu" in service.output(), within=60)
    told = time.monotonic()
    worker.terminate()
    assert worker.wait(10 * slowness()) == 0
    assert time.monotonic() - told < 4 * slowness()


def test_f21_cancelling_a_queued_job_twice_ends_it_once(service: Service) -> None:
    job_id = service.submit()
    for _ in range(2):
        service.store.requests.request_cancel("default", job_id)
    service.check_invariants(job_id)
    assert service.job(job_id).state == "cancelled"


def test_f21_cancelling_a_job_whose_worker_is_dead_ends_it_with_its_lease(service: Service) -> None:
    worker = service.start_worker("endless")
    job_id = service.submit_and_ring()
    service.await_log(job_id, "consumer")
    worker.kill()
    service.store.requests.request_cancel("default", job_id)
    service.start_control()
    eventually(lambda: "ticks every" in service.output(), within=60)
    service.await_state(job_id, "cancelled", within=service.settings.lease_ttl_s + 3)
    service.check_invariants(job_id)


@pytest.mark.parametrize("seed", [1])
def test_f21_a_cancellation_at_any_moment_leaves_one_clean_end(service: Service, seed: int) -> None:
    """The cancellation comes at a random time, from before the claim to after the end."""
    moments = random.Random(seed)
    slot, supervisor = service.slot("press", spare=True)
    supervisor.warm_up()
    ends = set()
    for _ in range(8):
        job_id = service.submit()
        thread = threading.Thread(target=slot.serve)
        thread.start()
        time.sleep(moments.uniform(0, 0.6))
        for _ in range(2):
            service.store.requests.request_cancel("default", job_id)
        thread.join(10 * slowness())
        assert not thread.is_alive()
        ends.add(service.await_state(job_id, "succeeded", "cancelled", within=1).state)
        service.check_invariants(job_id)
    supervisor.close()
    assert "cancelled" in ends
