"""F8, F12, F16, F17, F27, F31: full disks, wrong clocks, too little memory, too few file handles, a full broker."""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.ids import new_id
from nightpress.core.service.jobs.records import WorkerOffer
from tests.servers import S3, Valkey
from tests.service import MIB, RECIPE, Service, eventually


def can_mount() -> bool:
    probe = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False)
    return probe.returncode == 0


@pytest.mark.skipif(not can_mount(), reason="this user may not mount a small disk")
def test_f8_a_full_disk_is_said_left_clean_and_the_worker_goes_on(service: Service, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    small = service.model_id, service.model_digest
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(os.urandom(6 * MIB))
    large = service.register(new_id("mdl"), folder)
    worker = service.start_worker(
        "press",
        through=["unshare", "-m", "sh", "-c", f'mount -t tmpfs -o size=8m tmpfs {disk} && exec "$@"', "sh"],
        NIGHTPRESS_DATA_DIR=str(disk),
        NIGHTPRESS_STORAGE_URL=service.settings.objects_url,
    )
    service.model_id, service.model_digest = large
    job_id = service.submit_and_ring(max_failures=2)
    job = service.await_state(job_id, "failed", within=30)
    assert job.error is not None
    assert (job.error["code"], job.attempt) == ("disk_full", 2)
    inside = Path(f"/proc/{worker.pid}/root{disk}")
    eventually(lambda: not list(inside.glob("work/*/run_*/source/*")), within=5)
    service.model_id, service.model_digest = small
    service.await_state(service.submit_and_ring(), "succeeded", within=30)
    service.check_invariants(job_id)


@pytest.mark.parametrize("skew", ["3600", "-3600", "jumping"])
def test_f12_a_worker_whose_clock_is_wrong_works_as_any_other(service: Service, skew: str) -> None:
    service.start_control()
    service.start_worker("slow", NIGHTPRESS_TEST_CLOCK=skew)
    job_id = service.submit()
    job = service.await_state(job_id, "succeeded", within=30)
    assert (job.attempt, job.failures) == (1, 0)
    assert job.finished_at is not None
    assert job.started_at is not None
    assert 3 < (job.finished_at - job.started_at).total_seconds() < 30
    assert abs(job.finished_at.timestamp() - time.time()) < 30, "times are the database's"
    service.check_invariants(job_id)


@pytest.mark.parametrize(
    ("behaviour", "code", "said"),
    [
        ("killed_at_its_limit", "out_of_memory", "killed by the kernel"),
        ("one_of_several_killed_at_its_limit", "out_of_memory", "killed by the kernel"),
        ("out_of_addresses", "out_of_memory", "more memory than there is"),
        ("cuda_out_of_memory", "gpu_out_of_memory", "Tried to allocate 20 GiB"),
    ],
)
def test_f16_f17_a_job_that_wants_too_much_memory_says_which(
    service: Service, behaviour: str, code: str, said: str
) -> None:
    job_id = service.submit(max_failures=1)
    slot, supervisor = service.slot(behaviour, memory=400 * MIB)
    slot.serve()
    supervisor.close()
    error = service.job(job_id).error
    assert error is not None
    assert error["code"] == code
    assert said in error["message"]
    if behaviour.endswith("killed_at_its_limit"):
        assert error["details"]["peak_bytes"] > 360 * MIB
    service.check_invariants(job_id)


MEMORY_GROUPS = Path("/sys/fs/cgroup/memory")


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A control group with a limit of 40 MiB, separate from that of the tests."""
    group = MEMORY_GROUPS / new_id("np")
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(40 * MIB))
    except OSError as error:
        pytest.skip(f"this user may not make a control group for memory: {error}")
    yield group
    eventually(lambda: not (group / "cgroup.procs").read_text(), within=5)
    group.rmdir()


def run_in(group: Path, code: str) -> subprocess.CompletedProcess[str]:
    enter = f"import pathlib, os; pathlib.Path({str(group / 'cgroup.procs')!r}).write_text(str(os.getpid()))\n"
    return subprocess.run(
        [sys.executable, "-c", enter + code], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )


def test_f16_a_job_killed_by_somebody_is_not_blamed_for_anothers_memory(service: Service, small_group: Path) -> None:
    job_id = service.submit(max_failures=1)
    slot, supervisor = service.slot("killed_by_somebody", memory=400 * MIB)
    with ThreadPoolExecutor(1) as threads:
        serving = threads.submit(slot.serve)
        service.await_state(job_id, "running", within=20)
        assert run_in(small_group, f"held = bytearray({400 * MIB})").returncode == -signal.SIGKILL
        serving.result()
    supervisor.close()
    error = service.job(job_id).error
    assert error is not None
    assert error["code"] == "worker_lost"


def test_f16_a_workers_own_group_counts_what_the_kernel_kills_in_it(small_group: Path) -> None:
    said = run_in(
        small_group,
        "import subprocess, sys\n"
        "from nightpress.worker.cgroup import oom_kills\n"
        "before = oom_kills()\n"
        f"victim = subprocess.run([sys.executable, '-c', 'held = bytearray({400 * MIB})'])\n"
        "print(victim.returncode, oom_kills() - before)\n",
    )
    assert said.stdout.split() == [str(-signal.SIGKILL), "1"], said


@pytest.mark.gpu
@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="there is no GPU here")
def test_f17_a_gpus_memory_is_back_to_what_it_was_when_the_child_is_gone(service: Service) -> None:
    def used() -> int:
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])

    before = used()
    for behaviour in ("fills_the_gpu", "killed_on_the_gpu"):
        job_id = service.submit(max_failures=1)
        slot, supervisor = service.slot(behaviour, memory=64 * 1024 * MIB)
        slot.serve()
        supervisor.close()
        error = service.job(job_id).error
        assert error is not None
        assert error["code"] == ("gpu_out_of_memory" if behaviour == "fills_the_gpu" else "worker_lost")
        eventually(lambda: used() <= before + 64, within=10)


def test_f27_a_worker_without_file_handles_works_again_when_it_has_some(service: Service) -> None:
    service.settings = service.settings.model_copy(update={"retry_backoff_s": 1.0})
    worker = service.start_worker("press")
    service.await_state(service.submit_and_ring(), "succeeded")
    before = resource.prlimit(worker.pid, resource.RLIMIT_NOFILE)
    held = len(list(Path(f"/proc/{worker.pid}/fd").iterdir()))
    resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, (held, before[1]))
    job_id = service.submit(max_failures=8)
    eventually(lambda: "Too many open files" in service.output(), within=15)
    resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, before)
    service.await_state(job_id, "succeeded", within=30)
    service.check_invariants(job_id)


@pytest.mark.parametrize("policy", ["noeviction", "allkeys-lru"])
def test_f27_a_broker_that_takes_no_more_or_forgets_costs_time_and_no_job(
    service: Service, valkey_server: Valkey, policy: str
) -> None:
    service.start_worker("press")
    service.start_control()
    with redis.Redis.from_url(valkey_server.url) as client:
        client.config_set("maxmemory-policy", policy)
        client.config_set("maxmemory", "1")
        try:
            refused = service.submit()
            service.await_state(refused, "succeeded", within=20)
        finally:
            client.config_set("maxmemory", "0")
            client.config_set("maxmemory-policy", "noeviction")
    after = service.submit()
    service.await_state(after, "succeeded", within=20)
    for job_id in (refused, after):
        service.check_invariants(job_id)


def fill(disk: Path) -> Path:
    """Fill the disk to its last byte. Returns the file that fills it."""
    filler = disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return filler


@pytest.mark.skipif(not can_mount(), reason="this user may not mount a small disk")
def test_f31_a_worker_with_a_full_disk_fails_no_jobs_and_works_again_when_there_is_room(
    service: Service, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    bad = service.start_worker(
        "slow",
        through=["unshare", "-m", "sh", "-c", f'mount -t tmpfs -o size=8m tmpfs {disk} && exec "$@"', "sh"],
        NIGHTPRESS_DATA_DIR=str(disk),
        NIGHTPRESS_STORAGE_URL=service.settings.objects_url,
    )
    [bad_id] = [worker.id for worker in service.store.roster.workers()]
    filler = fill(Path(f"/proc/{bad.pid}/root{disk}"))
    service.start_worker("press")
    job_ids = [service.submit(max_failures=2) for _ in range(6)]
    service.ring()
    for job_id in job_ids:
        job = service.await_state(job_id, "succeeded", "failed", within=60)
        assert (job.state, job.failures) == ("succeeded", 0), job.error
        service.check_invariants(job_id)

    def state() -> tuple[str, str | None]:
        [seen] = [worker for worker in service.store.roster.workers() if worker.id == bad_id]
        return seen.state, seen.unfit

    said = eventually(lambda: state()[1], within=20)
    assert "is full" in said
    assert state()[0] == "unfit"
    filler.unlink()
    eventually(lambda: state() in {("idle", None), ("busy", None)}, within=20)


def test_f31_a_machine_without_the_storages_credentials_gives_jobs_back_until_it_has_them(
    tmp_path: Path, sqlite_url: str, valkey_server: Valkey, s3_server: S3
) -> None:
    bucket = {
        "storage_url": f"s3://{s3_server.create_bucket()}/np",
        "s3_endpoint_url": s3_server.endpoint,
        "s3_access_key_id": s3_server.access_key,
        "s3_secret_access_key": s3_server.secret_key,
    }
    service = Service(tmp_path, sqlite_url, broker_url=valkey_server.url, lease_ttl_s=10.0, **bucket)
    try:
        service.start_worker("press", NIGHTPRESS_S3_SECRET_ACCESS_KEY="wrong")
        job_id = service.submit_and_ring(max_failures=2)
        [worker] = eventually(lambda: [worker for worker in service.store.roster.workers() if worker.unfit], within=20)
        assert worker.state == "unfit"
        assert service.job(job_id).state == "queued"
        service.start_worker("press")
        service.ring()
        job = service.await_state(job_id, "succeeded", within=60)
        assert job.failures == 0
        service.check_invariants(job_id)
    finally:
        service.close()


def test_f31_a_job_is_not_offered_again_where_the_machine_failed_it_and_fails_where_many_did(service: Service) -> None:
    job_id = service.submit(max_failures=3)
    offers = [WorkerOffer(f"worker-{at}", "cpu", "cpu", 1024 * MIB, 1) for at in range(3)]
    fault = NightpressError(ErrorCode.DISK_FULL, "The disk is full.")
    for at, offer in enumerate(offers):
        claimed = service.store.claims.claim(offer, ttl_s=60)
        assert claimed is not None
        assert service.store.reader.machine_faults(job_id) == at
        assert service.store.attempts.release(claimed.lease, fault)
        assert service.store.claims.claim(offer, ttl_s=60) is None, "another worker may have it"
    job = service.job(job_id)
    assert (job.state, job.failures, job.attempt) == ("queued", 0, 3)
    assert [event.data["error"]["code"] for event in service.events(job_id) if event.kind == "released"] == [
        "disk_full"
    ] * 3


def test_f31_a_recipe_of_a_newer_release_waits_for_a_worker_that_can_read_it(service: Service) -> None:
    job_id = service.submit({**RECIPE, "passes": [{"pass": "invented-next-year"}]}, max_failures=2)
    slot, supervisor = service.slot("press")
    slot.serve()
    supervisor.close()
    job = service.job(job_id)
    assert (job.state, job.failures) == ("queued", 0)
    [released] = [event for event in service.events(job_id) if event.kind == "released"]
    assert "older" in released.data["error"]["details"]["machine"]
    other = service.submit(max_failures=2)
    slot, supervisor = service.slot("press")
    slot.serve()
    supervisor.close()
    assert service.job(other).state == "succeeded", "the worker serves what it can read"
    assert service.job(job_id).state == "failed", "no worker of two could read it"


def test_f31_a_folder_that_this_machine_lacks_leaves_the_job_to_another(service: Service, tmp_path: Path) -> None:
    """The model was registered in place, on a mount that one worker's machine lacks."""
    folder, away = tmp_path / "mounted", tmp_path / "unmounted"
    shutil.copytree(service.settings.data_dir / "upload", folder)
    service.model_id, service.model_digest = service.register(new_id("mdl"), folder, in_place=True)
    job_id = service.submit(max_failures=2)

    def serve() -> None:
        slot, supervisor = service.slot("press")
        slot.serve()
        supervisor.close()

    folder.rename(away)
    serve()
    assert (service.job(job_id).state, service.job(job_id).failures) == ("queued", 0)
    [released] = [event for event in service.events(job_id) if event.kind == "released"]
    assert str(folder) in released.data["error"]["details"]["machine"]
    away.rename(folder)
    serve()
    assert service.job(job_id).state == "succeeded"

    (folder / "config.json").unlink()
    other = service.submit(max_failures=1)
    serve()
    error = service.job(other).error
    assert error is not None
    assert (error["code"], "config.json" in error["message"]) == ("not_found", True)
