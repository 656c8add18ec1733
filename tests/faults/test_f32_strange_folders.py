"""F32: `nightpress up` in a folder that a power cut, a full disk or a person damaged: it starts, or says in a sentence what to do."""

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from nightpress import migrations
from nightpress.client.cli.main import main
from nightpress.core.stack_state import StackState
from tests.faults.test_f08_limits_of_the_machine import can_mount
from tests.patience import slowness
from tests.servers import free_port
from tests.service import ROOT, eventually


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("s") / "np"  # a short path, because it is part of a unix socket's path
    folder.mkdir(mode=0o700)
    return folder


def environment(folder: Path, port: int) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("NIGHTPRESS_")}
    own = {"NIGHTPRESS_DATA_DIR": str(folder), "NIGHTPRESS_API_PORT": str(port), "NIGHTPRESS_WORKER_SPARE": "false"}
    return {**clean, **own, "PYTHONPATH": str(ROOT), "XDG_CONFIG_HOME": str(folder.parent / "config")}


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[[], str]]:
    """A function that starts the stack. It returns the URL when the stack accepts requests with the key in its folder."""
    started: list[subprocess.Popen[bytes]] = []
    port = free_port()

    def start() -> str:
        log = (folder.parent / "log").open("ab")
        with log:
            command = [sys.executable, "-m", "nightpress.worker.devstack"]
            started.append(subprocess.Popen(command, env=environment(folder, port), cwd=ROOT, stdout=log, stderr=log))

        def answers() -> bool:
            assert started[-1].poll() is None, (folder.parent / "log").read_text()
            try:
                headers = {"Authorization": f"Bearer {(folder / 'key').read_text().strip()}"}
                url = f"http://127.0.0.1:{port}"
                ready = httpx.get(f"{url}/readyz", timeout=5, trust_env=False).json()["status"] == "ok"
                return ready and httpx.get(f"{url}/v1/me", headers=headers, timeout=5, trust_env=False).is_success
            except (httpx.HTTPError, OSError):
                return False

        eventually(answers, within=60)
        return f"http://127.0.0.1:{port}"

    yield start
    for process in started:
        process.terminate()
        process.wait(60 * slowness())


def damage_log(folder: Path) -> None:
    kept = folder / "valkey" / "appendonlydir"
    kept.mkdir(parents=True)
    (kept / "appendonly.aof.manifest").write_bytes(b"no manifest \xff\n")
    (folder / "valkey" / "valkey.conf").mkdir()
    (folder / "valkey.sock").mkdir()


def put_file_in_place_of_folder(folder: Path) -> None:
    (folder / "valkey").write_text("a file")
    (folder / "valkey.sock").write_text("a file")
    (folder / "valkey.password").write_text("")


def put_link_in_place_of_folder(folder: Path) -> None:
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("mine")
    (folder / "valkey").symlink_to(elsewhere)


def other_databases_key(folder: Path) -> None:
    """Write a valid key that is not in the database, as after the database was moved away."""
    import zlib

    body = f"np_abcdefgh_{secrets.token_urlsafe(32)}"
    (folder / "key").write_text(f"{body}{zlib.crc32(body.encode()) & 0xFFFFFF:06x}\n")


def empty_key(folder: Path) -> None:
    (folder / "key").write_text("")


def leave_strange_state(folder: Path) -> None:
    (folder / "devstack.json").write_text(json.dumps({"started": {"x": "y"}, "pids": 5, "api_url": []}))
    (folder / "devstack.json.partial").mkdir()
    assert StackState.load(folder).api_url == ""


@pytest.mark.parametrize(
    "disorders",
    [
        (damage_log, other_databases_key),
        (put_file_in_place_of_folder, empty_key),
        (put_link_in_place_of_folder, leave_strange_state),
    ],
    ids=lambda disorders: ", ".join(disorder.__name__ for disorder in disorders),
)
def test_f32_the_stack_comes_up_whatever_its_broker_its_key_and_its_state_file_are(
    folder: Path, start: Callable[[], str], disorders: tuple[Callable[[Path], None], ...]
) -> None:
    for disorder in disorders:
        disorder(folder)
    url = start()
    state = StackState.load(folder)
    assert (state.api_url, set(state.pids)) == (url, {"stack", "broker", "api", "worker", "control"})
    assert all(psutil.pid_exists(pid) for pid in state.pids.values())
    if put_link_in_place_of_folder in disorders:
        assert [path.name for path in (folder.parent / "elsewhere").iterdir()] == ["mine"]


STRANGE_STATES = [
    "",
    "[]",
    "null",
    "[" * 100_000,
    "\udcff",
    '{"api_url": 5}',
    '{"api_url": "http://[::"}',
    '{"api_url": "file:///etc/passwd"}',
    '{"pids": [1, "x"]}',
    '{"pids": {"stack": -1}}',
    '{"pids": {"stack": 99999999999999999999999}}',
    '{"started": {"x": 1}}',
    '{"started": {"1": "x"}}',
    '{"started": {"0": 1e999}}',
]


def command(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The status of a command. It runs in the test's own process: starting Python takes longer."""
    for name in [name for name in os.environ if name.startswith("NIGHTPRESS_")]:
        monkeypatch.delenv(name)
    for name, value in environment(folder, 1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["nightpress", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize("text", STRANGE_STATES, ids=lambda text: text[:24])
def test_f32_a_strange_state_file_says_nothing_and_stops_nobody(
    folder: Path, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "devstack.json").write_bytes(os.fsencode(text))
    assert StackState.load(folder) == StackState()
    status = command(folder, monkeypatch, "down")
    said = capsys.readouterr()
    assert (status, said.err) == (0, ""), said.err
    assert "is running" in said.out


def overwrite_header(folder: Path) -> None:
    (folder / "nightpress.db").write_bytes(os.urandom(8192))


def overwrite_pages(folder: Path) -> None:
    path = folder / "nightpress.db"
    migrations.upgrade(f"sqlite:///{path}")
    size = path.stat().st_size
    with path.open("r+b") as stream:
        stream.seek(100)
        stream.write(os.urandom(size - 100))


def cut_secret_short(folder: Path) -> None:
    (folder / "secret").write_bytes(b"x" * 5)


def make_key_a_folder(folder: Path) -> None:
    (folder / "key").mkdir()


def fill_key_with_bytes(folder: Path) -> None:
    (folder / "key").write_bytes(b"\xff\xfe\x00")


def make_logs_a_file(folder: Path) -> None:
    (folder / "logs").write_text("a file")


@pytest.mark.parametrize(
    ("disorder", "said"),
    [
        (overwrite_header, "The database is damaged"),
        (overwrite_pages, "The database is damaged"),
        (cut_secret_short, "secret holds 5 bytes, not 32"),
        (make_key_a_folder, "key: Is a directory. Move it away"),
        (fill_key_with_bytes, "Is it the `key`? Move it away"),
        (make_logs_a_file, "logs: File exists. Move it away"),
    ],
)
def test_f32_what_a_start_cannot_mend_is_said_with_what_to_do(
    folder: Path,
    disorder: Callable[[Path], None],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    disorder(folder)
    assert command(folder, monkeypatch, "up") == 1
    errors = capfd.readouterr().err
    assert said in errors
    assert "Traceback" not in errors
    assert not StackState.load(folder).pids, "nothing is left that looks like a running stack"


@pytest.mark.skipif(not can_mount(), reason="no right to mount a small disk")
def test_f32_a_full_disk_is_said_before_anything_starts(folder: Path) -> None:
    small = f"mount -t tmpfs -o size=64k none {folder} && head -c 60k /dev/zero > {folder}/filler"
    command = f"{small}; exec {sys.executable} -m worker.devstack"
    ended = subprocess.run(
        ["unshare", "-m", "sh", "-c", command],
        env=environment(folder, 1),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60 * slowness(),
    )
    assert ended.returncode == 1
    assert "full" in ended.stderr
    assert "ake room there" in ended.stderr
    assert "Traceback" not in ended.stderr
