"""A claimed job in a real child process: the supervisor commits its result or reports its failure, whatever the child does wrong."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nightpress.core.ids import new_id
from nightpress.worker.metrics import REGISTRY
from tests.patience import slowness
from tests.service import MIB, Service, eventually, pids_said, running


@pytest.fixture
def service(tmp_path: Path, sqlite_url: str) -> Iterator[Service]:
    service = Service(tmp_path, sqlite_url)
    yield service
    service.close()


def serve(service: Service, behaviour: str, **more: int) -> None:
    slot, supervisor = service.slot(behaviour, **more)
    slot.serve()
    supervisor.close()


def fail_with(service: Service, behaviour: str, **limits: float) -> dict[str, object]:
    """Run a job, with one failure allowed, until it fails. Returns the error in its row."""
    job_id = service.submit(max_failures=1, **limits)
    serve(service, behaviour)
    job = service.job(job_id)
    assert job.state == "failed", service.log(job_id)
    service.check_invariants(job_id)
    assert job.error is not None
    return job.error


@pytest.mark.slow
def test_a_job_runs_from_claim_to_committed_artifacts(tmp_path: Path, sql_url: str) -> None:
    service = Service(tmp_path, sql_url)
    job_id = service.submit()
    serve(service, "press")
    job = service.job(job_id)
    assert (job.state, job.verdict, job.attempt, job.failures) == ("succeeded", "accepted", 1, 0), service.log(job_id)
    (artifact,) = service.store.reader.artifacts(job_id)
    assert [file["path"] for file in artifact.files] == ["config.json", "model.safetensors"]
    report = service.store.reader.report(job_id)
    assert report is not None
    assert report["environment"]["threads"] == 1
    assert service.objects.stat(f"jobs/{job_id}/attempts/1/manifest.json") is not None
    service.check_invariants(job_id)
    service.close()


@pytest.mark.slow
def test_what_an_attempt_takes_is_counted(service: Service) -> None:
    def counted(name: str, **labels: str) -> float:
        return REGISTRY.get_sample_value(f"nightpress_{name}", labels) or 0.0

    asked: list[tuple[str, dict[str, str]]] = [
        ("claims_total", {"queue": "cpu"}),
        ("attempts_total", {"queue": "cpu", "outcome": "succeeded"}),
        ("attempts_total", {"queue": "cpu", "outcome": "worker_lost"}),
        ("phase_seconds_count", {"phase": "pressing"}),
        ("transfer_bytes_total", {"direction": "fetching"}),
        ("transfer_bytes_total", {"direction": "uploading"}),
    ]
    before = [counted(name, **labels) for name, labels in asked]
    for behaviour in ("press", "leave"):
        service.submit(max_failures=1)
        serve(service, behaviour)
    grown = [counted(name, **labels) - old for (name, labels), old in zip(asked, before, strict=True)]
    assert grown[:3] == [2, 1, 1]
    assert grown[3] >= 1
    assert all(bytes_moved >= 50_000 for bytes_moved in grown[4:])


@pytest.mark.slow
def test_what_an_earlier_attempt_could_not_remove_goes_with_the_next(service: Service) -> None:
    slot, supervisor = service.slot("press", spare=True)
    supervisor.warm_up()
    (left,) = (service.settings.data_dir / "work").glob("wkr_*/")
    (left / "run_left" / "out").mkdir(parents=True)
    service.submit()
    slot.serve()
    (spare,) = left.iterdir()
    assert spare.name != "run_left"
    supervisor.close()


@pytest.mark.slow
def test_one_call_works_through_the_whole_queue(service: Service) -> None:
    jobs = [service.submit() for _ in range(3)]
    serve(service, "press")
    assert [service.job(job_id).state for job_id in jobs] == ["succeeded"] * 3


def test_a_job_that_does_not_fit_is_left_to_a_larger_worker(service: Service) -> None:
    job_id = service.submit(needs_memory=2048 * MIB)
    serve(service, "press", memory=1024 * MIB)
    assert service.job(job_id).state == "queued"


@pytest.mark.slow
def test_the_spare_child_takes_the_next_job_and_is_replaced(service: Service) -> None:
    slot, supervisor = service.slot("press", spare=True)
    supervisor.warm_up()
    spare = supervisor._spare
    assert spare is not None
    job_id = service.submit()
    slot.serve()
    report = service.store.reader.report(job_id)
    assert report is not None
    assert report["environment"]["folder"] == spare.job_dir.name
    assert supervisor._spare is not None
    assert supervisor._spare.pid != spare.pid
    supervisor.close()


@pytest.mark.slow
def test_a_spare_that_died_while_it_waited_costs_no_attempt(service: Service) -> None:
    slot, supervisor = service.slot("press", spare=True)
    supervisor.warm_up()
    assert supervisor._spare is not None
    os.kill(supervisor._spare.pid, 9)
    supervisor._spare.wait(5 * slowness())
    job_id = service.submit()
    slot.serve()
    assert (service.job(job_id).state, service.job(job_id).attempt) == ("succeeded", 1)
    supervisor.close()


@pytest.mark.parametrize(
    ("behaviour", "code", "said"),
    [
        ("segfault", "worker_lost", "SIGSEGV"),
        ("nameless_signal", "worker_lost", "a real-time signal"),
        ("leave", "worker_lost", "status 3"),
        ("full_disk", "disk_full", "No space left"),
        ("smuggle", "internal", "symbolic link"),
        ("tamper", "checksum_mismatch", "other bytes"),
    ],
)
@pytest.mark.slow
def test_what_a_child_does_wrong_becomes_a_code(service: Service, behaviour: str, code: str, said: str) -> None:
    error = fail_with(service, behaviour)
    assert error["code"] == code
    assert said in str(error["message"])


@pytest.mark.slow
def test_the_last_words_of_a_child_that_crashed_are_in_the_log(service: Service) -> None:
    job_id = service.submit(max_failures=1)
    serve(service, "segfault")
    assert "Segmentation fault" in service.log(job_id)


@pytest.mark.slow
def test_memory_of_a_childs_own_children_counts(service: Service) -> None:
    job_id = service.submit(max_failures=1)
    serve(service, "hog", memory=200 * MIB)
    error = service.job(job_id).error
    assert error is not None
    assert error["code"] == "out_of_memory"
    assert error["details"]["peak_bytes"] > 200 * MIB


@pytest.mark.slow
def test_signs_of_life_are_no_progress(service: Service) -> None:
    assert fail_with(service, "wedged", stall_s=1.0)["code"] == "stalled"


@pytest.mark.slow
def test_a_run_past_its_limit_is_stopped_and_not_repeated(service: Service) -> None:
    job_id = service.submit(max_failures=5, run_limit_s=4 * slowness())  # enough time for the child to start
    serve(service, "endless")
    job = service.job(job_id)
    assert (job.state, job.attempt) == ("failed", 1)
    assert job.error is not None
    assert job.error["code"] == "deadline_exceeded"
    assert not running(pids_said(service.await_log(job_id, "consumer")))


@pytest.mark.slow
def test_nonsense_on_the_frame_channel_is_logged_and_harms_nothing(service: Service) -> None:
    job_id = service.submit()
    serve(service, "babble")
    assert service.job(job_id).state == "succeeded"
    log = service.log(job_id)
    assert "said on standard output" in log
    assert "said on standard error" in log
    assert log.count("can't be read") == 3


@pytest.mark.slow
def test_a_cancelled_run_ends_with_everything_it_started(service: Service) -> None:
    job_id = service.submit()
    thread = threading.Thread(target=serve, args=(service, "endless"))
    thread.start()
    said = pids_said(service.await_log(job_id, "consumer"))
    asked = time.monotonic()
    service.store.requests.request_cancel("default", job_id)
    service.await_state(job_id, "cancelled", within=5)
    assert time.monotonic() - asked < 5 * slowness()
    thread.join(10 * slowness())
    assert not running(said)
    service.check_invariants(job_id)


@pytest.mark.slow
def test_progress_and_phases_reach_the_row_while_it_runs(service: Service) -> None:
    job_id = service.submit()
    thread = threading.Thread(target=serve, args=(service, "slow"))
    thread.start()
    seen = set()

    def done() -> bool:
        job = service.job(job_id)
        seen.add((job.phase, round(job.progress, 1)))
        return job.state == "succeeded"

    eventually(done, within=20)
    thread.join(10 * slowness())
    assert len([item for item in seen if item[0] == "pressing"]) >= 3


@pytest.mark.slow
def test_a_model_that_lies_on_this_machine_is_used_in_place(service: Service, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"w" * 1000)
    service.model_id, service.model_digest = service.register(new_id("mdl"), folder, in_place=True)
    job_id = service.submit()
    serve(service, "press")
    assert service.job(job_id).state == "succeeded", service.job(job_id).error
    assert (folder / "model.safetensors").read_bytes() == b"w" * 1000


def test_a_model_that_changed_on_disk_since_it_was_registered_is_refused(service: Service, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"w" * 1000)
    service.model_id, service.model_digest = service.register(new_id("mdl"), folder, in_place=True)
    (folder / "model.safetensors").write_bytes(b"x" * 1000)
    error = fail_with(service, "press")
    assert error["code"] == "checksum_mismatch"
    assert "model.safetensors" in str(error["message"])


def test_a_source_that_is_gone_from_storage_fails_the_job_and_leaves_nothing(service: Service) -> None:
    service.objects.delete_prefix(f"models/{service.model_id}")
    assert fail_with(service, "press")["code"] == "not_found"
