"""Which GPU a worker offers: it follows CUDA_VISIBLE_DEVICES as CUDA does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nightpress.core.errors import NightpressError
from nightpress.core.service.jobs.records import OfferedGpu, WorkerOffer
from nightpress.core.settings import Settings
from nightpress.worker import sandbox
from nightpress.worker.gpus import Gpu, GpuError, list_gpus, offered_gpus, visible_gpus
from nightpress.worker.offer import introduce, make_offer

GIB = 2**30
FIRST = Gpu("GPU-1a2b0000-0000", "NVIDIA L4", 24 * GIB)
SECOND = Gpu("GPU-1a2bffff-0001", "NVIDIA H100", 80 * GIB)
HALVES = tuple(Gpu(f"MIG-{number}000", "NVIDIA H100 MIG 3g.40gb", 40 * GIB) for number in (5, 6))
DIVIDED = Gpu("GPU-3c4d0000-0002", "NVIDIA H100", 80 * GIB, HALVES)
HOST = (FIRST, SECOND, DIVIDED)


@pytest.mark.parametrize(
    ("asked", "visible"),
    [
        (None, [FIRST, SECOND, HALVES[0]]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("0", [FIRST]),
        ("1", [SECOND]),
        ("1,0", [SECOND, FIRST]),
        (" 1 , 0 ", [SECOND, FIRST]),
        ("1,7,0", [SECOND]),
        ("0,-1,1", [FIRST]),
        ("7", []),
        ("0,0", []),
        ("GPU-1a2bffff-0001", [SECOND]),
        ("GPU-1a2bf", [SECOND]),
        ("GPU-1a2b", []),
        ("GPU-ffff", []),
        ("GPU-1a2bffff-0001,0", [SECOND, FIRST]),
        ("MIG-6000", [HALVES[1]]),
        ("MIG-5000,MIG-6000", list(HALVES)),
        ("MIG-7000", []),
        ("2", [HALVES[0]]),
        ("GPU-3c4d0000-0002", [HALVES[0]]),
    ],
)
def test_what_the_variable_shows(asked: str | None, visible: list[Gpu]):
    assert visible_gpus(HOST, asked) == visible


def test_a_worker_offers_what_the_variable_shows_or_everything():
    assert offered_gpus(HOST, None) == [FIRST, SECOND, *HALVES], "all instances of a divided GPU"
    for asked in ("", "1", "2,0", "MIG-6000", "GPU-1a2b"):
        assert offered_gpus(HOST, asked) == visible_gpus(HOST, asked)


def test_a_worker_tells_its_gpus_by_kind():
    offered = tuple(OfferedGpu(gpu.uuid, gpu.name, gpu.memory) for gpu in (SECOND, *HALVES, FIRST, SECOND))
    offer = WorkerOffer("wkr", "gpu", "several", 512 * GIB, 60, offered, cpu_jobs=1)
    told = introduce(offer, draining=False)
    assert told.gpu_kinds == [[24 * GIB, 1], [40 * GIB, 1], [80 * GIB, 2]], "two instances are not two GPUs for a job"
    assert told.gpu_memory == 80 * GIB
    assert [gpu["uuid"] for gpu in told.gpus or ()] == [gpu.uuid for gpu in offered]
    assert (told.threads, told.cpu_jobs, offer.shares) == (10, 1, 6)
    alone = introduce(WorkerOffer("wkr", "cpu", "cpu", GIB, 4), draining=False)
    assert (alone.threads, alone.gpus, alone.gpu_kinds, alone.gpu_memory) == (4, None, None, None)


def test_a_host_without_gpus_has_none_to_show():
    assert visible_gpus((), None) == []
    assert visible_gpus((), "0") == []


def test_a_child_counts_gpus_as_its_worker_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    given = sandbox.child_environment(tmp_path, 1)
    assert (given["CUDA_VISIBLE_DEVICES"], given["CUDA_DEVICE_ORDER"]) == ("1", "PCI_BUS_ID")


def _has_gpu() -> bool:
    try:
        return bool(list_gpus())
    except GpuError:
        return False


@pytest.mark.skipif(_has_gpu(), reason="this machine has a GPU")
def test_a_machine_without_nvml_offers_no_gpu():
    with pytest.raises(NightpressError, match="it has no GPU"):
        make_offer(Settings(worker_queue="gpu"), "wkr")


@pytest.mark.gpu
@pytest.mark.skipif(not _has_gpu(), reason="there is no GPU here")
def test_the_gpu_that_is_offered_is_the_one_that_torch_sees(monkeypatch: pytest.MonkeyPatch):
    for gpu in list_gpus():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpu.uuid)
        offer = make_offer(Settings(worker_queue="gpu"), "wkr")
        ask = "import torch; one = torch.cuda.get_device_properties(0); print(one.uuid, one.name, sep='|')"
        said = subprocess.run([sys.executable, "-c", ask], env=os.environ, capture_output=True, text=True, check=True)
        uuid, name = said.stdout.strip().split("|")
        assert [offered.uuid for offered in offer.gpus] == [gpu.uuid]
        assert gpu.uuid.endswith(uuid)
        assert offer.device == name
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(NightpressError, match="CUDA_VISIBLE_DEVICES= leaves it none of GPU-"):
        make_offer(Settings(worker_queue="gpu"), "wkr")
