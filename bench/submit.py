"""Submitting jobs over HTTP with PostgreSQL, beside a bare FastAPI endpoint that does one INSERT and commit.

    python -m bench.submit [--seconds 5] [--rounds 4] [--no-fsync]

Both use the same uvicorn settings, engine settings and PostgreSQL server. Rounds alternate between them, so that noise affects both
equally. The load comes from a separate process: a closed loop over 16 connections, then an open loop at 50 requests/s.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection as PipeConnection
from pathlib import Path
from typing import Any

import httpx
import psutil

from bench.record import Figure, finish, make_parser

CONNECTIONS = 16
OPEN_RATE = 50
POOL = 8
_PATIENCE_S = 120.0  #: seconds that a server may take to start on a busy machine


# The peer ------------------------------------------------------------------------------------------------------------


def serve_bare(url: str, port: int) -> None:
    """Serve a minimal FastAPI endpoint that stores one row."""
    import uvicorn
    from fastapi import FastAPI
    from pydantic import BaseModel
    from sqlalchemy import Column, MetaData, String, Table, insert
    from sqlalchemy.dialects.postgresql import JSONB

    from nightpress.core.database import make_engine
    from nightpress.core.ids import new_id

    engine = make_engine(url, pool_size=POOL)
    rows = Table("bare", MetaData(), Column("id", String(40), primary_key=True), Column("body", JSONB, nullable=False))
    rows.create(engine, checkfirst=True)
    app = FastAPI()

    class Body(BaseModel):
        model: str
        recipe: str
        labels: dict[str, str] = {}

    @app.post("/v1/jobs", status_code=201)
    def create(body: Body) -> dict[str, str]:
        row_id = new_id("job")
        with engine.begin() as connection:
            connection.execute(insert(rows).values(id=row_id, body=body.model_dump()))
        return {"id": row_id, "state": "queued"}

    @app.get("/healthz")
    def healthz() -> dict[str, str]:
        return {"status": "ok"}

    uvicorn.run(app, host="127.0.0.1", port=port, log_config=None, access_log=False, server_header=False)


# The load ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A server, and the request to send to it."""

    port: int
    headers: dict[str, str]
    body: bytes
    process: int  #: the server's PID
    keyed: bool  #: whether each request has a new Idempotency-Key, as our client sends it


class Caller:
    """A keep-alive HTTP/1.1 connection that sends prepared requests one after another. httpx would use more CPU than the servers."""

    def __init__(self, target: Target) -> None:
        lines = "".join(f"{name}: {value}\r\n" for name, value in target.headers.items())
        self._head = f"POST /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1:{target.port}\r\n{lines}".encode()
        self._tail = (
            f"Content-Type: application/json\r\nContent-Length: {len(target.body)}\r\n\r\n".encode() + target.body
        )
        self._port = target.port
        self._keyed = target.keyed

    async def open(self) -> None:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)

    async def send(self) -> float:
        """Send one request and read its answer. Returns the milliseconds."""
        key = f"Idempotency-Key: {secrets.token_hex(16)}\r\n".encode() if self._keyed else b""
        began = time.perf_counter()
        self._writer.write(self._head + key + self._tail)
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
        body = await self._reader.readexactly(length)
        if b" 201 " not in head[:20]:
            raise RuntimeError(f"{head.decode()}{body[:500].decode()}")
        return (time.perf_counter() - began) * 1000

    def close(self) -> None:
        self._writer.close()


async def _closed_loop(connections: list[Caller], seconds: float) -> float:
    """Requests per second if every connection sends its next request as soon as it gets an answer."""
    ends_at = time.perf_counter() + seconds

    async def send_until_the_end(connection: Caller) -> int:
        count = 0
        while time.perf_counter() < ends_at:
            await connection.send()
            count += 1
        return count

    began = time.perf_counter()
    counts = await asyncio.gather(*(send_until_the_end(connection) for connection in connections))
    return sum(counts) / (time.perf_counter() - began)


async def _open_loop(connections: list[Caller], seconds: float) -> list[float]:
    """Latencies in milliseconds of requests that start at fixed times, whether or not earlier requests were answered."""
    idle: asyncio.Queue[Caller] = asyncio.Queue()
    for connection in connections:
        idle.put_nowait(connection)

    async def send_at(due: float) -> float:
        connection = await idle.get()
        waited = (time.perf_counter() - due) * 1000  # the server causes a late start, so it counts
        took = await connection.send()
        idle.put_nowait(connection)
        return waited + took

    tasks, began = [], time.perf_counter()
    for number in range(int(seconds * OPEN_RATE)):
        due = began + number / OPEN_RATE
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(send_at(due)))
    return list(await asyncio.gather(*tasks))


def generate_load(pipe: PipeConnection, target: Target, mode: str, seconds: float) -> None:
    async def run() -> float | list[float]:
        connections = [Caller(target) for _ in range(CONNECTIONS)]
        for connection in connections:
            await connection.open()
        try:
            return await (_closed_loop if mode == "closed" else _open_loop)(connections, seconds)
        finally:
            for connection in connections:
                connection.close()

    pipe.send(asyncio.run(run()))


def load(target: Target, mode: str, seconds: float) -> Any:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=generate_load, args=(there, target, mode, seconds))
    process.start()
    there.close()
    result = here.recv()
    process.join()
    return result


# The two servers -----------------------------------------------------------------------------------------------------


def start(command: list[str], port: int, env: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start a server and wait until it answers. Raises RuntimeError with its log if it ends, or does not answer within `_PATIENCE_S`."""
    with log.open("wb") as stream:
        process = subprocess.Popen(command, env={**os.environ, **env}, stdout=stream, stderr=stream)
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            httpx.get(f"http://127.0.0.1:{port}/healthz").raise_for_status()
        except httpx.HTTPError:
            if process.poll() is not None or time.monotonic() > deadline:
                status = process.poll()
                process.kill()
                what = f"did not answer within {_PATIENCE_S:g} s" if status is None else f"ended with status {status}"
                raise RuntimeError(f"{' '.join(command)} {what}: {log.read_text() or 'it said nothing'}") from None
            time.sleep(0.05)
        else:
            return process


def measure(folder: Path, *, seconds: float, rounds: int, durable: bool) -> list[Figure]:
    from nightpress import migrations
    from nightpress.core.database import make_engine
    from nightpress.core.service.access.keys import create_key
    from tests.models import bert_tiny_dir
    from tests.servers import Postgres, Valkey, free_port

    with Postgres(folder / "postgres", durable=durable) as postgres, Valkey(folder / "valkey") as valkey:
        url = postgres.create_database()
        migrations.upgrade(url)
        engine = make_engine(url)
        _, key = create_key(engine, name="bench", scopes=["admin"])
        engine.dispose()
        models = folder / "models"
        models.mkdir()
        model = bert_tiny_dir(models)
        ours_port, bare_port = free_port(), free_port()
        settings = {
            "NIGHTPRESS_DATA_DIR": str(folder / "data"),
            "NIGHTPRESS_DATABASE_URL": url,
            "NIGHTPRESS_BROKER_URL": valkey.url,
            "NIGHTPRESS_API_PORT": str(ours_port),
            "NIGHTPRESS_MODEL_ROOTS": json.dumps([str(models)]),
            "NIGHTPRESS_MAX_QUEUED_JOBS": "10000000",
        }
        bare = [sys.executable, "-m", "bench.submit", "--serve-bare", url, str(bare_port)]
        servers = []
        try:
            servers.append(start([sys.executable, "-m", "nightpress.api"], ours_port, settings, folder / "ours.log"))
            servers.append(start(bare, bare_port, {}, folder / "bare.log"))
            headers = {"Authorization": f"Bearer {key}"}
            made = httpx.post(
                f"http://127.0.0.1:{ours_port}/v1/models", headers=headers, json={"name": "tiny", "path": str(model)}
            )
            made.raise_for_status()
            body = json.dumps({"model": "tiny", "recipe": "int8-encoder", "labels": {"team": "bench"}}).encode()
            targets = {
                "ours": Target(ours_port, headers, body, servers[0].pid, keyed=True),
                "bare": Target(bare_port, {}, body, servers[1].pid, keyed=False),
            }
            return _compare(targets, seconds, rounds)
        finally:
            for server in servers:
                server.terminate()
                server.wait(20)


def _compare(targets: dict[str, Target], seconds: float, rounds: int) -> list[Figure]:
    for target in targets.values():
        load(target, "closed", 1.0)  # warm-up
    rates: dict[str, list[float]] = {name: [] for name in targets}
    costs: dict[str, list[float]] = {name: [] for name in targets}
    for number in range(rounds):
        order = list(targets) if number % 2 == 0 else list(targets)[::-1]
        for name in order:
            before = _cpu_s(targets[name])
            rates[name].append(load(targets[name], "closed", seconds))
            costs[name].append(1000 * (_cpu_s(targets[name]) - before) / (rates[name][-1] * seconds))
    latencies = {name: sorted(load(target, "open", max(seconds, 10.0))) for name, target in targets.items()}
    figures = []
    for name, values in latencies.items():
        spread = round(min(rates[name]), 1), round(max(rates[name]), 1)
        figures += [
            Figure(f"{name}/rate", round(statistics.median(rates[name]), 1), "requests/s", spread),
            Figure(f"{name}/cpu", round(statistics.median(costs[name]), 3), "ms of the server's CPU time a request"),
            Figure(f"{name}/p50", round(values[len(values) // 2], 2), f"ms at {OPEN_RATE}/s"),
            Figure(
                f"{name}/p99",
                round(values[int(len(values) * 0.99)], 2),
                f"ms at {OPEN_RATE}/s",
                bar="< 50" if name == "ours" else "",
            ),
        ]
    ratio = statistics.median(ours / bare for ours, bare in zip(rates["ours"], rates["bare"], strict=True))
    return [*figures, Figure("ratio", round(ratio, 3), "of the bare endpoint's rate", bar=">= 0.7")]


def _cpu_s(target: Target) -> float:
    """CPU seconds of the server's process so far, without the database. They vary less than wall time on a noisy machine."""
    times = psutil.Process(target.process).cpu_times()
    return float(times.user + times.system)


def main() -> int:
    parser = make_parser("submit", __doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--no-fsync", action="store_true", help="a database that doesn't wait for its disk: CPU alone")
    parser.add_argument("--serve-bare", nargs=2, metavar=("URL", "PORT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve_bare:
        serve_bare(options.serve_bare[0], int(options.serve_bare[1]))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), seconds=options.seconds, rounds=options.rounds, durable=not options.no_fsync)
    return finish("submit", figures, parser, options)


if __name__ == "__main__":
    sys.exit(main())
