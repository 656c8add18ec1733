"""F1, F2, F11, F15: a worker or a child that is killed or frozen, and a job that kills every child."""

import os
import signal
import time

from tests.patience import slowness
from tests.service import Service, eventually, pids_said, running


def test_f1_a_killed_worker_takes_its_child_along_and_another_finishes_the_job(service: Service) -> None:
    service.start_control()
    worker = service.start_worker("first_slow")
    job_id = service.submit()
    said = pids_said(service.await_log(job_id, "consumer"))
    worker.kill()
    killed = time.monotonic()
    eventually(lambda: not running(said), within=1.0, every=0.01)
    service.start_worker("first_slow")
    job = service.await_state(job_id, "succeeded", within=10)
    assert time.monotonic() - killed < 10 * slowness()
    assert (job.attempt, job.failures) == (2, 1)
    assert service.kinds(job_id).count("requeued") == 1
    worker.wait()
    service.check_invariants(job_id)


def test_f2_a_killed_child_is_told_with_its_signal_and_tried_again_and_its_worker_serves_on(service: Service) -> None:
    service.start_control()
    service.start_worker("endless")
    job_id = service.submit_and_ring(max_failures=2)
    for attempt in (1, 2):

        def said_by(attempt: int = attempt) -> list[int]:
            lines = [
                log for log in service.store.reader.logs(job_id) if log.attempt == attempt and "consumer" in log.text
            ]
            return pids_said(lines[0].text) if lines else []

        said = eventually(said_by)
        os.kill(said[0], signal.SIGKILL)
        eventually(lambda said=said: not running(said), within=10)  # its descendants end too
    job = service.await_state(job_id, "failed", within=10)
    assert job.error is not None
    assert (job.error["code"], job.error["details"]["signal"]) == ("worker_lost", 9)
    assert (job.attempt, job.failures) == (2, 2)
    service.check_invariants(job_id)
    service.await_state(service.submit_and_ring(), "running", within=10)


def test_f11_a_worker_that_was_frozen_past_its_lease_changes_nothing_when_it_wakes(service: Service) -> None:
    service.start_control()
    zombie = service.start_worker("first_slow")
    job_id = service.submit()
    said = pids_said(service.await_log(job_id, "consumer"))
    zombie.send_signal(signal.SIGSTOP)
    # Without word from its worker that the lease is held, the child ends itself: no two children of a job may run at once.
    eventually(lambda: not running(said), within=service.settings.lease_ttl_s + 1.5)
    service.start_worker("first_slow")
    job = service.await_state(job_id, "succeeded", within=10)
    before = service.events(job_id)
    zombie.send_signal(signal.SIGCONT)
    eventually(lambda: "lease" in service.output() or zombie.poll() is not None, within=10)
    time.sleep(1)
    assert service.job(job_id) == job
    assert service.events(job_id) == before
    assert zombie.poll() is None, "it goes on serving"
    service.check_invariants(job_id)


def test_f15_a_poison_job_fails_after_its_attempts_and_blocks_nobody(service: Service) -> None:
    slot, _ = service.slot("segfault")
    poison = service.submit(max_failures=2, priority=10)
    other = service.submit(max_failures=1, tenant_id="neighbour")
    eventually(lambda: slot.serve() or service.job(poison).state == "failed")
    job = service.job(poison)
    assert (job.attempt, job.failures) == (2, 2)
    assert job.error is not None
    assert job.error["details"]["signal"] == signal.SIGSEGV
    kinds = eventually(lambda: [kind for kind in service.kinds(other) if kind == "failed"])
    assert kinds == ["failed"]
    first = next(event.at for event in service.events(other) if event.kind == "started")
    last = next(event.at for event in service.events(poison) if event.kind == "failed")
    assert first < last, "the neighbour's job waited for all attempts of the poison job"
