"""S13, S14: what a child under the control of a hostile model can reach, and what an attacker with access to the broker can do."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import redis
from celery import Celery
from kombu import Queue

from nightpress.worker import landlock, sandbox, view, walls
from nightpress.worker.probe import probe_walls
from nightpress.worker.walls import Walls
from tests.servers import Valkey
from tests.service import ROOT, Service, eventually, load_json

needs_landlock = pytest.mark.skipif(
    landlock.version() < landlock.ABSTRACT_SOCKETS, reason="this kernel's Landlock is older"
)
#: what the processes of one job, and exporters, must be able to do
JOB_NEEDS = (
    "a socket of its own",
    "shared memory of its own",
    "a program of the system",
    "linking work into its result",
)
SECRETS = {
    "NIGHTPRESS_DATABASE_URL": "postgresql://u:hunter2@db/x",
    "NIGHTPRESS_S3_SECRET_ACCESS_KEY": "hunter2",
    "NIGHTPRESS_BROKER_URL": "redis://:hunter2@broker",
    "AWS_SECRET_ACCESS_KEY": "hunter2",
    "PGPASSWORD": "hunter2",
    "LD_PRELOAD": "",
    "HTTPS_PROXY": "http://u:hunter2@proxy",
}


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Walls:
    return probe_walls(tmp_path_factory.mktemp("probed") / "run", network=False)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The log of `spy` in tests/children.py: attempt → "yes: …" or "no: …"."""
    from nightpress import migrations

    folder = tmp_path_factory.mktemp("spied")
    url = f"sqlite:///{folder / 'np' / 'nightpress.db'}"
    (folder / "np").mkdir(mode=0o700)
    migrations.upgrade(url)
    shared, left = Path("/dev/shm/nightpress-victim"), Path("/dev/shm/nightpress-left")
    with (
        pytest.MonkeyPatch.context() as patch,
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as broker,
        socket.socket(socket.AF_UNIX) as pathless,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bystander,
    ):
        broker.bind(str(folder / "np" / "valkey.sock"))
        pathless.bind("\0nightpress-spy")
        bystander.bind(str(folder / "bystander"))
        for listener in (broker, pathless):
            listener.listen()
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        service = Service(folder, url)
        key, database = service.settings.data_dir / "key", service.settings.data_dir / "nightpress.db"
        key.write_text("np_secret")
        key.chmod(0o600)
        os.utime(database, (1000, 1000))
        shared.write_text("another tenant's weights")
        asked = {
            "port": server.getsockname()[1],
            "supervisor": os.getpid(),
            "broker": str(folder / "np" / "valkey.sock"),
            "bystander": str(folder / "bystander"),
            "shared": str(shared),
            "left": str(left),
        }
        victim = subprocess.Popen([sys.executable, "-c", "input()", "nightpress-neighbour"], stdin=subprocess.PIPE)
        try:
            job_id = service.submit()
            slot, _ = service.slot(f"spy:{json.dumps(asked)}")
            slot.serve()
            assert service.job(job_id).state == "succeeded", service.job(job_id).error
            told = load_json(service.await_log(job_id, "environment"))
            cached = next((service.settings.data_dir / "cache" / "blobs").iterdir())
            told["after"] = json.dumps([oct(path.stat().st_mode & 0o777) for path in (key, cached)])
            told["left"] = str(left.exists())
            yield told
        finally:
            victim.kill()
            victim.communicate()
            shared.unlink()
            left.unlink(missing_ok=True)
            service.close()


@pytest.mark.slow
def test_the_environment_is_an_allow_list(found: dict[str, str]) -> None:
    env = json.loads(found["environment"])
    assert "hunter2" not in found["environment"]
    assert not {name for name in env if name.startswith(("NIGHTPRESS", "AWS", "PG", "LD_P", "HTTP"))}
    assert env["HF_HUB_OFFLINE"] == env["TRANSFORMERS_OFFLINE"] == "1"
    assert env["OMP_NUM_THREADS"] == "1"


@needs_landlock
@pytest.mark.parametrize(
    "what",
    [
        "init's environment",
        "the supervisor's environment",
        "the supervisor's memory",
        "killing the supervisor",
        "the supervisor's name",
        "the kernel's settings",
        "the data folder",
        "the key",
        "the database",
        "another job's folder",
        "the cache",
        "writing the source",
        "a home folder",
        "writing beside",
        "writing /tmp",
        "the network",
    ],
)
def test_out_of_reach(found: dict[str, str], what: str) -> None:
    assert found[what].startswith("no"), found[what]


@pytest.mark.parametrize(
    ("what", "wall"),
    [
        ("the broker's socket", walls.SOCKETS),
        ("a socket without a path", walls.SOCKETS),
        ("half a pair of datagrams", walls.SOCKETS),
        ("the key's mode", walls.METADATA),
        ("the database's times", walls.METADATA),
        ("the key's attributes", walls.METADATA),
        ("the cached model's mode", walls.METADATA),
        ("another job's shared memory", walls.SHARED_MEMORY),
        ("another's command line", walls.PROCESSES),
        ("ten thousand threads", walls.TASKS),
        ("a virtual machine's socket", walls.CALLS),
        ("memory without a file", walls.CALLS),
        ("a namespace of its own", walls.CALLS),
        ("the user's keyring", walls.CALLS),
    ],
)
def test_behind_a_wall(found: dict[str, str], standing: Walls, what: str, wall: str) -> None:
    if wall in standing.down:
        pytest.skip(f"{wall}: {standing.down[wall]}")
    assert found[what].startswith("no"), found[what]


def test_nothing_is_left_behind_or_changed(found: dict[str, str], standing: Walls) -> None:
    if {walls.METADATA, walls.SHARED_MEMORY} & standing.down.keys():
        pytest.skip(str(standing))
    assert json.loads(found["after"]) == ["0o600", "0o444"]
    assert found["left"] == "False"


def test_what_it_needs_is_within_reach(found: dict[str, str]) -> None:
    # CUDA sets its threads' names when it starts.
    for what in ("its own environment", "writing its folder", "a temporary file", "its own threads' names", *JOB_NEEDS):
        assert found[what].startswith("yes"), (what, found[what])


def test_resources_are_limited(found: dict[str, str]) -> None:
    assert found["open files"].split()[3:5] == ["4096", "4096"]
    assert found["core"].split()[4:6] == ["0", "0"]


@pytest.fixture
def alone(tmp_path: Path, sqlite_url: str) -> Iterator[Service]:
    service = Service(tmp_path, sqlite_url)
    yield service
    service.close()


@pytest.mark.slow
def test_shared_memory_that_no_process_maps_counts_as_the_jobs(alone: Service, standing: Walls) -> None:
    if walls.FILES in standing.down or walls.SHARED_MEMORY in standing.down:
        pytest.skip(str(standing))
    job_id = alone.submit(max_failures=1)
    slot, _ = alone.slot("hides_memory", memory=512 * 1024**2)
    slot.serve()
    job = alone.job(job_id)
    assert job.error is not None
    assert job.error["code"] == "out_of_memory", job.error


@pytest.mark.slow
def test_no_file_of_a_job_is_longer_than_the_disk_has_room(alone: Service) -> None:
    job_id = alone.submit(max_failures=1)
    slot, _ = alone.slot("long_file")
    slot.serve()
    job = alone.job(job_id)
    assert job.error is not None
    assert job.error["code"] == "disk_full", job.error


_WITHOUT_NAMESPACES = (
    'for kind in user mnt pid net ipc uts; do echo 0 > /proc/sys/user/max_${kind}_namespaces; done; exec "$@"'
)


def without_namespaces(*command: str) -> list[str]:
    """The command, run where the kernel grants no namespaces, as in most containers."""
    return ["unshare", "--user", "--map-root-user", "sh", "-c", _WITHOUT_NAMESPACES, "sh", *command]


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A job's folder. Skips the test where this kernel can't run a command without namespaces."""
    if subprocess.run(without_namespaces("true"), capture_output=True).returncode:
        pytest.skip("no user namespace can be made here")
    sandbox.prepare_folder(tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.slow
def test_where_there_are_no_namespaces_it_is_said_which_walls_are_missing(bare: Path) -> None:
    command = without_namespaces(sys.executable, "-P", "-m", "nightpress.worker.probe", str(bare))
    probed = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    down = json.loads(probed.stdout)
    assert {walls.NETWORK, walls.PROCESSES} <= down.keys()
    assert "user namespace" in down[walls.NETWORK]
    assert walls.METADATA not in down, "seccomp stands in"
    if not view.gpu_devices():
        assert walls.SOCKETS not in down, "seccomp stands in"
    if landlock.version():
        assert walls.FILES not in down, "Landlock stands in"


@pytest.mark.slow
def test_without_namespaces_no_socket_is_reached_and_no_mode_changed(bare: Path, tmp_path: Path) -> None:
    if view.gpu_devices():
        pytest.skip("CUDA keeps its sockets where there are no namespaces")
    key = tmp_path / "key"
    key.touch(mode=0o600)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "broker"))
        listener.listen()
        script = (
            "import os, socket, sys; from pathlib import Path; from nightpress.worker.enclosure import enclose\n"
            "def work(walls):\n"
            "    os.chmod(sys.argv[2], 0o666)\n"
            "    try: socket.socket(socket.AF_UNIX).connect(sys.argv[3])\n"
            "    except OSError as error: os.write(1, os.strerror(error.errno).encode())\n"
            "    os._exit(0)\n"
            "inner = enclose(Path(sys.argv[1]), work, network=False); inner.wait(); inner.end()\n"
        )
        command = without_namespaces(sys.executable, "-c", script, str(bare), str(key), str(tmp_path / "broker"))
        said = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert said.stdout == "Address family not supported by protocol", said.stderr
    assert key.stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
def test_a_worker_says_first_which_walls_stand(alone: Service) -> None:
    alone.start_worker()
    first = alone.output().splitlines()[0]
    assert "walled off: " in first
    assert "Not walled off: " in first


def test_a_childs_folder_is_its_owners_alone(tmp_path: Path) -> None:
    sandbox.prepare_folder(tmp_path / "run")
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "run", tmp_path / "run" / "work")} == {0o700}


@pytest.mark.slow
def test_a_spare_ends_with_its_supervisor(tmp_path: Path) -> None:
    """The supervisor is killed and sends no message: the child only sees the end of the stream."""
    script = (
        "import sys, time; from pathlib import Path; from nightpress.worker.process import ChildProcess; "
        "from tests.service import behaving; "
        f"child = ChildProcess(Path({str(tmp_path)!r}), threads=1, network=False, command=behaving('press')); "
        "print(child.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.stdout.close()
    parent.kill()
    parent.wait()
    eventually(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, within=2.0, every=0.01)


# S14 -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def service(tmp_path: Path, sqlite_url: str, valkey_server: Valkey) -> Iterator[Service]:
    valkey_server.flush()
    service = Service(tmp_path, sqlite_url, broker_url=valkey_server.url)
    yield service
    service.close()


@pytest.mark.slow
def test_whoever_reaches_the_broker_can_ring_and_nothing_more(service: Service, tmp_path: Path) -> None:
    worker = service.start_worker("press")
    eventually(lambda: "ready" in service.output())
    sentinel = tmp_path / "sentinel"
    forger = Celery("forger", broker=service.settings.celery_url)
    forger.conf.update(task_queues=[Queue("cpu")], task_serializer="pickle", accept_content=["pickle", "json"])
    forger.send_task("nightpress.ring", args=[_Bomb(str(sentinel))], queue="cpu", serializer="pickle")
    forger.send_task("os.system", args=[f"touch {sentinel}"], queue="cpu", serializer="json")
    forger.send_task("celery.backend_cleanup", queue="cpu", serializer="json")
    forger.send_task("nightpress.ring", args=["job_of_another"], kwargs={"job": "x"}, queue="cpu", serializer="json")
    forger.control.shutdown()
    with redis.Redis.from_url(service.settings.celery_url) as client:
        client.lpush("cpu", b"no message at all")
    forger.close()
    job_id = service.submit()
    service.await_state(job_id, "succeeded")
    assert worker.poll() is None
    assert not sentinel.exists()


class _Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)
