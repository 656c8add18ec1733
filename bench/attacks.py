"""How long `GET /v1/me` takes while the API is attacked. Each attack is one that got through once.

    python -m bench.attacks [--seconds 20] [ATTACK …]

The API and the control process are real, on PostgreSQL. An attack runs in a process of its own, from addresses of its own, for so many seconds
or until its last request is answered. Meanwhile a third process sends `GET /v1/me` with another tenant's key, each time over a new connection.
"""

import contextlib
import gzip
import hashlib
import http.client
import io
import json
import multiprocessing
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from typing import Any

import httpx
import numpy as np

from bench.record import Figure, finish, make_parser
from bench.stack import is_healthy, postgres_and_valkey
from nightpress.core.service.access.keys import ALL_SCOPES, create_key
from tests.servers import free_port
from tests.service import Service, eventually

MIB = 1024**2
ADDRESSES = tuple(f"127.0.1.{number}" for number in range(1, 17))  #: an attacker has several
PAUSE_S = 0.02  #: between two probes


@dataclass(frozen=True)
class Attacker:
    """Where the API is, and the key of an attacker who has one."""

    port: int
    key: str
    until: float  #: monotonic

    def connect(self, number: int = 0) -> socket.socket:
        source = ADDRESSES[number % len(ADDRESSES)]
        return socket.create_connection(("127.0.0.1", self.port), timeout=10, source_address=(source, 0))

    def client(self) -> httpx.Client:
        transport = httpx.HTTPTransport(local_address=ADDRESSES[0])
        headers = {"Authorization": f"Bearer {self.key}"}
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", headers=headers, transport=transport, timeout=300)

    def repeat(self, step: Callable[[], object], threads: int = 1) -> None:
        """Call `step` again and again, from several threads, until the time is over."""

        def work() -> None:
            while time.monotonic() < self.until:
                with contextlib.suppress(OSError, httpx.HTTPError):
                    step()

        workers = [threading.Thread(target=work) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    def bring(self, kind: str, name: str, files: dict[str, bytes]) -> None:
        """Announce a model or a data set, upload its files and complete it."""
        announced = [{"path": p, "size": len(b), "sha256": hashlib.sha256(b).hexdigest()} for p, b in files.items()]
        body = {"name": name, "files": announced} if kind == "models" else {"name": name, "file": announced[0]}
        with self.client() as client:
            made = client.post(f"/v1/{kind}", json=body).raise_for_status().json()
            for upload in made["uploads"]:
                for part in upload["parts"]:
                    piece = files[upload["path"]][part["offset"] : part["offset"] + part["size"]]
                    client.put(part["url"], content=piece).raise_for_status()
            client.post(f"/v1/{kind}/{made['id']}/complete")
            while client.get(f"/v1/{kind}/{made['id']}").json()["state"] == "verifying":
                time.sleep(0.2)
            client.delete(f"/v1/{kind}/{made['id']}")


def merge_keys(attacker: Attacker) -> None:
    """Recipes of 500 bytes whose YAML merge keys would unfold to gigabytes, eight at once."""
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{level}: &a{level} {{<<: [{', '.join([f'*a{level - 1}'] * 9)}]}}" for level in range(1, 8)]
    _validate_again_and_again(attacker, "\n".join(lines))


def deep_yaml(attacker: Attacker) -> None:
    """Recipes of 60 KB whose YAML is nested 30,000 deep, eight at once."""
    _validate_again_and_again(attacker, "[" * 30_000)


def wide_yaml(attacker: Attacker) -> None:
    """Recipes of 64 KB with as many entries as fit, eight at once."""
    _validate_again_and_again(attacker, "\n".join(f"a{number}: 1" for number in range(6500)))


def _validate_again_and_again(attacker: Attacker, recipe: str) -> None:
    with attacker.client() as client:
        attacker.repeat(lambda: client.post("/v1/recipes/validate", json={"recipe": recipe}), threads=8)


def deep_json(attacker: Attacker) -> None:
    """Bodies of 1 MB that are nothing but brackets, eight at once."""
    with attacker.client() as client:
        headers = {"Content-Type": "application/json"}
        attacker.repeat(lambda: client.post("/v1/jobs", content=b"[" * 1_000_000, headers=headers), threads=8)


def one_byte(attacker: Attacker) -> None:
    """Connections that send one byte and wait, as many as the API takes, from sixteen addresses; no key."""
    connections: list[socket.socket] = []
    while time.monotonic() < attacker.until:
        try:
            connection = attacker.connect(len(connections))
            connection.sendall(b"G")
            connections.append(connection)
        except OSError:
            time.sleep(0.1)
        if len(connections) > 15_000:
            connections.pop(0).close()
    for connection in connections:
        connection.close()


def endless_headers(attacker: Attacker) -> None:
    """Requests whose headers never end, eight at once; no key."""
    line = b"".join(b"X-%06d: " % number + b"a" * 1000 + b"\r\n" for number in range(1000))
    _send_without_end(attacker, b"GET /healthz HTTP/1.1\r\nHost: x\r\n", line)


def endless_url(attacker: Attacker) -> None:
    """Requests whose URL never ends, eight at once; no key."""
    _send_without_end(attacker, b"GET /", b"a" * MIB)


def _send_without_end(attacker: Attacker, head: bytes, piece: bytes) -> None:
    def step() -> None:
        with attacker.connect() as connection:
            connection.sendall(head)
            for _ in range(50):
                connection.sendall(piece)

    attacker.repeat(step, threads=8)


def silent_uploads(attacker: Attacker) -> None:
    """Sixteen uploads that send one byte of 50 MB and wait."""
    file = {"path": "model.safetensors", "size": 50_000_000, "sha256": "0" * 64}
    with attacker.client() as client, contextlib.ExitStack() as stack:
        made = client.post("/v1/models", json={"name": "silent", "files": [file]}).raise_for_status().json()
        head = (
            f"PUT {made['uploads'][0]['parts'][0]['url']} HTTP/1.1\r\nHost: x\r\n"
            f"Authorization: Bearer {attacker.key}\r\nContent-Length: 50000000\r\n\r\na"
        )
        for number in range(16):
            connection = stack.enter_context(attacker.connect(number))
            connection.sendall(head.encode())
        time.sleep(max(0.0, attacker.until - time.monotonic()))


def gzipped_lines(attacker: Attacker) -> None:
    """A data set of 400 kB that unpacks to 400 MB of line ends."""
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=9) as stream:
        stream.write(b"a")
        for _ in range(400):
            stream.write(b"\n" * 1_000_000)
    attacker.repeat(lambda: attacker.bring("datasets", f"lines-{time.monotonic_ns()}", {"a.txt.gz": packed.getvalue()}))


def json_beside_a_model(attacker: Attacker) -> None:
    """A model with seven files of 16 MB that hold empty lists."""
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    config = {"model_type": "bert", "architectures": ["BertModel"]}
    files = {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": len(header).to_bytes(8, "little") + header + bytes(4),
    }
    files |= {f"x{number}.json": b"[" + b"[]," * 5_500_000 + b"[]]" for number in range(7)}
    attacker.repeat(lambda: attacker.bring("models", f"lists-{time.monotonic_ns()}", files))


ATTACKS: dict[str, Callable[[Attacker], None]] = {
    attack.__name__: attack
    for attack in (
        *(merge_keys, deep_yaml, wide_yaml, deep_json, one_byte, endless_headers, endless_url),
        *(silent_uploads, gzipped_lines, json_beside_a_model),
    )
}


def _attack(name: str, port: int, key: str, seconds: float) -> None:
    ATTACKS[name](Attacker(port, key, time.monotonic() + seconds))


def _probe(port: int, key: str, over: Event, found: Any) -> None:
    """Send the milliseconds of each `GET /v1/me`. One that is refused or does not come within ten seconds counts as ten."""
    times = []
    while not over.is_set():
        began = time.monotonic()
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("GET", "/v1/me", headers={"Authorization": f"Bearer {key}"})
            right = connection.getresponse().status == 200
            connection.close()
        except (OSError, http.client.HTTPException):
            right = False
        times.append(1000 * (time.monotonic() - began) if right else 10_000.0)
        time.sleep(PAUSE_S)
    found.send(times)


def under(name: str | None, port: int, keys: tuple[str, str], seconds: float) -> list[float]:
    """The milliseconds of each probe while an attack lasts; None: while nothing else happens."""
    processes = multiprocessing.get_context("spawn")
    over = processes.Event()
    here, there = processes.Pipe()
    probe = processes.Process(target=_probe, args=(port, keys[1], over, there))
    probe.start()
    if name is None:
        time.sleep(seconds)
    else:
        attack = processes.Process(target=_attack, args=(name, port, keys[0], seconds))
        attack.start()
        attack.join()
    over.set()
    times: list[float] = here.recv()
    probe.join()
    return times


def measure(names: Iterable[str], seconds: float) -> list[Figure]:
    figures = []
    with postgres_and_valkey() as (folder, url, broker_url):
        port = free_port()
        service = Service(folder, url, broker_url=broker_url, api_port=port)
        keys = tuple(
            create_key(service.engine, tenant_id=tenant, name="bench", scopes=ALL_SCOPES)[1]
            for tenant in ("attacker", "default")
        )
        try:
            service.start("-m", "nightpress.api")
            service.start_control()
            eventually(lambda: is_healthy(f"http://127.0.0.1:{port}"), within=60)
            for name in (None, *names):
                times = np.asarray(under(name, port, (keys[0], keys[1]), seconds))
                row = name or "nothing"
                p50, p99 = np.percentile(times, [50, 99])
                figures += [
                    Figure(f"{row}/requests", len(times), "requests"),
                    Figure(f"{row}/p50_ms", round(float(p50), 1), "ms"),
                    Figure(f"{row}/p99_ms", round(float(p99), 1), "ms", bar="<= 1000"),
                    Figure(f"{row}/worst_ms", round(float(times.max()), 1), "ms"),
                ]
                print(f"{row}: p50 {p50:.1f} ms, p99 {p99:.1f} ms, worst {times.max():.1f} ms", flush=True)
        finally:
            service.close()
    return figures


def main() -> int:
    parser = make_parser("attacks", __doc__)
    parser.add_argument("attacks", nargs="*", metavar="ATTACK", help=f"by default all: {', '.join(ATTACKS)}")
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    for name in options.attacks:
        if name not in ATTACKS:
            parser.error(f"There is no attack {name!r}. There are: {', '.join(ATTACKS)}.")
    return finish(
        "attacks", measure(options.attacks or ATTACKS, options.seconds), parser, options, choices=("attacks",)
    )


if __name__ == "__main__":
    sys.exit(main())
