"""F28 and the embedded stack: one command starts a real stack in one folder, which leaves nothing behind and loses nothing."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import redis

from nightpress import migrations
from nightpress.core.ids import new_id
from tests.patience import slowness
from tests.servers import free_port
from tests.service import ROOT, Service, eventually, running


class Stack:
    """A folder in which a test starts and stops the stack."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "np"
        self.folder.mkdir()
        self.url = f"http://127.0.0.1:{free_port()}"
        sql_url = f"sqlite:///{self.folder / 'nightpress.db'}"
        migrations.upgrade(sql_url)
        self.service = Service(
            folder,
            sql_url,
            broker_url="",
            lease_ttl_s=5 * slowness(),
            api_port=int(self.url.rsplit(":", 1)[1]),
            worker_spare=False,
        )
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = self.service.start("-m", "nightpress.worker.devstack")
        eventually(self._ready, within=60)

    def _ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.service.output()
        try:
            answer = httpx.get(f"{self.url}/v1/workers", headers=self.headers, timeout=5).json()
        except (httpx.HTTPError, OSError):
            return False
        return any(worker["state"] in {"idle", "busy"} for worker in answer["items"])

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {(self.folder / 'key').read_text().strip()}"}

    @property
    def pids(self) -> dict[str, int]:
        found: dict[str, int] = json.loads((self.folder / "devstack.json").read_text())["pids"]
        return found


@pytest.fixture
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("s"))  # a short path, because it is part of a unix socket's path
    yield stack
    stack.service.close()


@pytest.mark.slow
def test_the_stack_starts_serves_refuses_a_second_and_leaves_nothing_running(stack: Stack) -> None:
    stack.start()
    pids = stack.pids
    assert set(pids) == {"stack", "broker", "api", "worker", "control"}
    assert (stack.folder / "key").stat().st_mode & 0o777 == 0o600
    assert httpx.get(f"{stack.url}/readyz", timeout=5).json()["status"] == "ok"
    password = stack.folder / "valkey.password"
    assert password.stat().st_mode & 0o777 == 0o600
    stranger = redis.Redis(unix_socket_path=str(stack.folder / "valkey.sock"))
    with stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()
    commands = [part for pid in pids.values() for part in psutil.Process(pid).cmdline()]
    assert not [part for part in commands if password.read_text().strip() in part]
    with redis.Redis(
        unix_socket_path=str(stack.folder / "valkey.sock"), password=password.read_text().strip()
    ) as client:
        assert client.config_get("appendonly") == {"appendonly": "no"}, "it holds nothing that is needed again"
    second = subprocess.run(
        [sys.executable, "-m", "nightpress.worker.devstack"],
        env=stack.service.environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert second.returncode == 1
    assert f"already runs in {stack.folder}: {stack.url}" in second.stderr
    assert running(list(pids.values())) == list(pids.values())
    assert stack.process is not None
    stack.process.terminate()
    assert stack.process.wait(40 * slowness()) == 0
    assert not running(list(pids.values()))
    assert not (stack.folder / "devstack.json").exists()


@pytest.mark.slow
def test_f28_a_killed_stack_takes_all_along_and_the_next_one_goes_on_with_its_jobs(
    stack: Stack, bert_tiny: Path
) -> None:
    """Where another process than the stack's own is killed, all end as well, and it is named."""
    service = stack.service
    service.model_id, service.model_digest = service.register(new_id("mdl"), bert_tiny)
    stack.start()
    key = (stack.folder / "key").read_text()
    recipe = {
        "name": "half",
        "passes": [{"pass": "magnitude", "sparsity": 0.5}],
        "exports": ["safetensors"],
        "evaluate": [{"metric": "fidelity", "samples": 2, "length": 8}],
    }
    job_id = service.submit(recipe)
    service.await_state(job_id, "running", within=30)
    children = [child.pid for child in psutil.Process(stack.pids["worker"]).children(recursive=True)]
    before = list(stack.pids.values())
    assert stack.process is not None
    stack.process.kill()
    stack.process.wait()
    eventually(lambda: not running(before + children), within=30)
    assert service.job(job_id).state == "queued"
    stack.start()
    job = service.await_state(job_id, "succeeded", "failed", within=120)
    assert job.state == "succeeded", job.error
    assert (job.attempt, job.failures) == (2, 0)
    assert (stack.folder / "key").read_text() == key
    service.check_invariants(job_id)
    pids = stack.pids
    os.kill(pids["control"], signal.SIGKILL)
    assert stack.process.wait(40 * slowness()) == 1
    assert not running(list(pids.values()))
    assert "The control process ended with status -9" in service.output()
