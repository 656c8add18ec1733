"""Connections that send too much, too little or nothing don't keep other clients out. None of these attacks needs a key."""

import contextlib
import json
import resource
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from nightpress.api.connections import bounds_of
from nightpress.core.settings import Settings
from tests.api import RunningApi, serve
from tests.patience import slowness
from tests.service import eventually

PATIENCE_S = 1.5
CONNECTIONS = 60
MIB = 1024**2


@pytest.fixture
def api(tmp_path: Path, sqlite_url: str, bert_tiny: Path) -> Iterator[RunningApi]:
    settings = Settings(
        _env_file=None,
        data_dir=tmp_path,
        database_url=sqlite_url,
        broker_url="redis://127.0.0.1:1/0",
        model_roots=[bert_tiny.parent],
        api_client_patience_s=PATIENCE_S,
        api_connections=CONNECTIONS,
    )
    with serve(settings) as running:
        yield running


def connect(api: RunningApi) -> socket.socket:
    host, _, port = api.url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=20 * slowness())


def answer_of(connection: socket.socket) -> tuple[int, dict[str, object]]:
    """Read until the connection is closed. Returns the answer's status and its problem body."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(65536):
            received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def is_served(api: RunningApi) -> bool:
    began = time.monotonic()
    assert httpx.get(f"{api.url}/healthz", trust_env=False, timeout=10 * slowness()).status_code == 200
    return time.monotonic() - began < slowness()


def is_cut_off(connection: socket.socket, *pieces: bytes) -> bool:
    """Send the pieces. Returns whether the other side closed the connection before it had read all of them."""
    try:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(0.01)
    except ConnectionError:
        return True
    return False


def is_closed(connection: socket.socket) -> bool:
    """Read until the other side closes the connection, and return True. Raises TimeoutError if it doesn't."""
    with contextlib.suppress(ConnectionError):
        while connection.recv(65536):
            pass
    return True


@pytest.mark.parametrize(
    ("begins", "goes_on"),
    [
        (b"GET /", b"a" * MIB),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Long: ", b"a" * MIB),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\n", b"".join(b"X-%04d: a\r\n" % at for at in range(10_000))),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * 2, b"GET /" + b"a" * MIB),
    ],
    ids=["address", "header", "headers", "behind others"],
)
def test_an_endless_head_is_cut_off_and_costs_no_memory(begins: bytes, goes_on: bytes, api: RunningApi):
    before = psutil.Process().memory_info().rss
    with connect(api) as connection:
        assert is_cut_off(connection, begins, *[goes_on] * 64)
    assert psutil.Process().memory_info().rss - before < 32 * MIB
    eventually(lambda: is_served(api))


def test_a_head_that_is_too_large_is_a_problem_that_says_so(api: RunningApi):
    answer = httpx.get(f"{api.url}/healthz", headers={"x-long": "a" * 40_000}, trust_env=False)
    assert answer.status_code == 431
    assert answer.headers["content-type"] == "application/problem+json"
    assert "headers" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"", "head"),
        (b"G", "head"),
        (b"\r\n", "head"),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\n", "head"),
        (b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{", "body"),
        (b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{", "body"),
    ],
    ids=["nothing", "a byte", "a line end", "half a head", "half a body", "half a chunk"],
)  # fmt: skip
def test_a_client_that_falls_silent_is_let_go(sent: bytes, said: str, api: RunningApi):
    began = time.monotonic()
    with connect(api) as connection:
        connection.sendall(sent)
        status, problem = answer_of(connection)
    assert status == 408
    assert said in str(problem["detail"])
    assert time.monotonic() - began < 4 * PATIENCE_S * slowness()


@pytest.mark.parametrize("begins", [b"", b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"])
def test_a_client_that_drips_is_let_go(begins: bytes, api: RunningApi):
    """One byte now and then doesn't count as progress, in a request's head or in its body."""
    began = time.monotonic()
    with connect(api) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(begins)
        while time.monotonic() - began < 20 * PATIENCE_S:
            connection.sendall(b"a")
            time.sleep(PATIENCE_S / 10)
    assert time.monotonic() - began < 4 * PATIENCE_S * slowness()


@pytest.mark.slow
def test_a_client_that_takes_no_answer_is_let_go(api: RunningApi):
    ask = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
    with connect(api) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(ask * 40)
        time.sleep(3 * PATIENCE_S * slowness())
        assert is_cut_off(connection, *[ask] * 100)
    assert is_served(api)


@pytest.mark.parametrize("sent", [b"G", b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"])
@pytest.mark.slow
def test_unfinished_requests_keep_nobody_out(sent: bytes, api: RunningApi):
    with contextlib.ExitStack() as open_ones:
        connections = [open_ones.enter_context(connect(api)) for _ in range(2 * CONNECTIONS)]
        for connection in connections:
            with contextlib.suppress(ConnectionError):  # the API closed the oldest connections
                connection.sendall(sent)
        for _ in range(5):
            assert is_served(api)


def test_one_address_takes_no_more_than_its_share(tmp_path: Path, sqlite_url: str):
    settings = Settings(
        _env_file=None,
        data_dir=tmp_path,
        database_url=sqlite_url,
        broker_url="redis://127.0.0.1:1/0",
        api_connections_per_address=5,
    )
    with serve(settings) as api, contextlib.ExitStack() as open_ones:
        connections = [open_ones.enter_context(connect(api)) for _ in range(8)]
        assert all(is_closed(connection) for connection in connections[:3]), "the newest stay"
        for connection in connections[3:]:
            connection.settimeout(0.2)
            with pytest.raises(TimeoutError):
                connection.recv(1)


@pytest.mark.slow
def test_a_stream_that_is_followed_is_no_idle_connection(api: RunningApi, bert_tiny: Path):
    """A stream outlasts every deadline, and a flood of idle connections displaces no connection with an unfinished answer."""
    with api.client() as client:
        client.post("/v1/models", json={"name": "tiny", "path": str(bert_tiny)}).raise_for_status()
        job_id = (
            client.post("/v1/jobs", json={"model": "tiny", "recipe": "int8-encoder"}).raise_for_status().json()["id"]
        )
        lines: list[str] = []
        answered = threading.Event()

        def follow() -> None:
            accept = {"accept": "text/event-stream"}
            with client.stream("GET", f"/v1/jobs/{job_id}/events", headers=accept, timeout=60) as stream:
                answered.set()
                lines.extend(stream.iter_lines())

        follower = threading.Thread(target=follow)
        follower.start()
        assert answered.wait(20 * slowness())  # before its request has come, its connection is as idle as the flood's
        with contextlib.ExitStack() as open_ones:
            for _ in range(2 * CONNECTIONS):
                open_ones.enter_context(connect(api))
            time.sleep(2 * PATIENCE_S)
        assert follower.is_alive()
        client.post(f"/v1/jobs/{job_id}/cancel").raise_for_status()
        follower.join(20 * slowness())
    assert any("cancelled" in line for line in lines)


def test_bounds_leave_room_for_everything_else_that_needs_a_file_handle():
    settings = Settings(_env_file=None, api_connections=10**9)
    handles, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert bounds_of(settings).connections < handles
