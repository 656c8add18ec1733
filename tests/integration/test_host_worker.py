"""A worker of a host: several jobs at a time, each child with its own GPUs, threads and memory. The GPUs are only names here."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from nightpress.worker.metrics import GPU_SECONDS
from nightpress.worker.slot import Slot
from tests.jobs import GB, host
from tests.patience import slowness
from tests.service import Service, eventually


@pytest.fixture
def service(tmp_path: Path, sqlite_url: str) -> Iterator[Service]:
    service = Service(tmp_path, sqlite_url, worker_queue="gpu", worker_threads=0)
    yield service
    service.close()


@pytest.mark.slow
def test_jobs_run_side_by_side_and_each_sees_its_own_gpus(service: Service) -> None:
    usual, supervisor = service.slot("tells_its_share")
    offer = host(usual._offer.worker_id, 4, threads=15, cpu_jobs=1)
    slot = Slot(service.store, supervisor, offer, ttl_s=service.settings.lease_ttl_s)
    *first, last = [service.submit(queue="gpu", needs_gpus=count, needs_memory=GB) for count in (2, 1, 1, 3)]
    beside = service.submit()
    before = GPU_SECONDS._value.get()
    eventually(lambda: slot.serve() or not service.unfinished(), within=60)
    shares = {job_id: share_of(service, job_id) for job_id in (*first, last, beside)}
    gpus = [gpu for job_id in first for gpu in shares[job_id]["gpus"].split(",")]
    assert sorted(gpus) == [f"GPU-HBM3-{number}" for number in range(4)], "side by side, and no GPU twice"
    assert len(shares[last]["gpus"].split(",")) == 3
    assert shares[beside]["gpus"] == "", "a CPU job sees none"
    assert [share["threads"] for share in shares.values()] == [6, 3, 3, 9, 3]
    assert sum(shares[job_id]["memory"] for job_id in (*first, beside)) <= 64 * GB
    assert GPU_SECONDS._value.get() - before >= 1.5 * 7, "the time of each GPU counts"
    slot.close(timeout=20 * slowness())
    assert service.store.roster.workers() == []


def share_of(service: Service, job_id: str) -> dict[str, object]:
    assert service.job(job_id).state == "succeeded"
    service.check_invariants(job_id)
    [line] = [line.text for line in service.store.reader.logs(job_id) if line.text.startswith("{")]
    share: dict[str, object] = json.loads(line)
    return share


@pytest.mark.slow
def test_a_worker_that_drains_gives_all_its_jobs_back(service: Service) -> None:
    usual, supervisor = service.slot("endless")
    offer = host(usual._offer.worker_id, 2)
    slot = Slot(service.store, supervisor, offer, ttl_s=service.settings.lease_ttl_s)
    both = [service.submit(queue="gpu", needs_memory=GB) for _ in range(2)]
    third = service.submit(queue="gpu", needs_memory=GB)
    slot.open()
    eventually(lambda: all(service.job(job_id).phase == "pressing" for job_id in both), within=30)
    slot.close(timeout=30 * slowness())
    assert [service.job(job_id).state for job_id in (*both, third)] == ["queued"] * 3
    assert [(service.job(job_id).attempt, service.job(job_id).failures) for job_id in both] == [(1, 0)] * 2
