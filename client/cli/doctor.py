"""`nightpress doctor`: check everything that Nightpress needs, and say how to repair what is wrong."""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import typer

from nightpress.client.cli import output
from nightpress.client.cli.exits import Exit
from nightpress.client.cli.session import Session, takes_session
from nightpress.client.client import Client
from nightpress.client.discovery import find_server
from nightpress.client.errors import ApiError, ClientError, UnreachableError
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.settings import Settings, load_settings
from nightpress.core.version import VERSION

_LOW_DISK = 5 * 1000**3
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
_CONSUMERS = ("transformers", "compressed-tensors", "onnxruntime", "openvino")


@dataclass(frozen=True)
class Check:
    """The result of a check. `mend`: what to do where the status is not ok."""

    name: str
    status: Literal["ok", "warning", "failed"]
    found: str
    mend: str = ""  #: part of the JSON output


def add_to(app: typer.Typer) -> None:
    app.command("doctor", rich_help_panel="This machine")(takes_session(doctor))


def doctor(session: Session) -> None:
    """Check database, broker, storage, API, key, versions, disk, torch and GPU, and say how to repair what is wrong."""
    failed = False
    for check in examine(session, load_settings()):
        failed |= check.status == "failed"
        if session.json:
            output.print_json(asdict(check))
            continue
        mark, style = {"ok": ("ok  ", "green"), "warning": ("warn", "yellow"), "failed": ("FAIL", "red")}[check.status]
        output.say(f"{mark}  {check.name:<10} {check.found}", style)
        if check.mend:
            output.say(f"      {'':<10} → {check.mend}")
    raise typer.Exit(Exit.JOB_FAILED if failed else Exit.OK)


def examine(session: Session, settings: Settings) -> Iterator[Check]:
    """Make each check and yield its result."""
    yield Check("versions", "ok", f"nightpress {VERSION}, Python {sys.version.split()[0]}")
    place = find_server(settings, session.api, profile=session.profile)
    key = place.key
    has_access = bool(key.value or place.sign_in)
    with Client(place.url, key.value or (None if place.sign_in else "none"), retries=0, timeout_s=10) as client:
        try:
            ready = client.ready()
        except (UnreachableError, ApiError, ClientError) as error:
            yield Check("API", "failed", f"{error.message} (address from {place.source})", error.hint)
            yield from _check_parts(settings)
        else:
            version = f"version {ready.version} at {place.url}, address from {place.source}"
            same = ready.version == VERSION
            yield Check(
                "API",
                "ok" if same else "warning",
                version,
                "" if same else "Install the same version on client and server.",
            )
            for name, state in ready.checks.items():
                ok = state == "ok"
                yield Check(
                    name, "ok" if ok else "failed", f"{state}, as the API sees it", "" if ok else _REPAIR.get(name, "")
                )
            yield _check_key(client, has_access, key.source)
            if has_access:
                yield _check_workers(client)
    yield _check_disk(settings)
    yield _check_isolation(settings)
    yield from _check_torch()
    yield check_vllm(settings.vllm_python)


_REPAIR = {
    "database": "Is it up, and is NIGHTPRESS_DATABASE_URL right? `python -m nightpress.migrations upgrade` creates its tables.",
    "broker": "Is Redis or Valkey up, and is NIGHTPRESS_BROKER_URL right? Jobs wait safely in the database meanwhile.",
    "storage": "Does the bucket or folder exist, and are NIGHTPRESS_STORAGE_URL and the S3 credentials right?",
}


def _check_parts(settings: Settings) -> Iterator[Check]:
    """Without an API to ask, try database, broker and storage from here, with this shell's settings."""
    # Imported late: no other subcommand needs these, and they would slow the start of each.
    from nightpress.core.artifacts.open import open_store
    from nightpress.core.database import make_engine, read_now, transaction

    own = " (tried from here, with this shell's settings)"
    if not settings.database_url and not (settings.data_dir / "nightpress.db").exists():
        yield Check("database", "warning", f"none yet in {settings.data_dir}{own}", "`nightpress up` creates it.")
        return

    def ask_database() -> None:
        with transaction(make_engine(settings.sql_url), read_only=True) as connection:
            read_now(connection)

    attempts: dict[str, Callable[[], object]] = {
        "database": ask_database,
        "broker": lambda: _ping_broker(settings),
        "storage": lambda: open_store(settings).check(),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
        except NightpressError as error:
            yield Check(name, "failed", f"{error.message}{own}", _REPAIR[name])
        else:
            yield Check(name, "ok", f"answers{own}")


def _ping_broker(settings: Settings) -> None:
    import redis

    url = settings.broker_url or f"unix://:{settings.broker_password}@{settings.broker_socket}"
    try:
        redis.Redis.from_url(url, socket_connect_timeout=2.0, socket_timeout=2.0).ping()
    except redis.RedisError as error:
        raise NightpressError(ErrorCode.INTERNAL, f"It does not answer: {error}.") from error


def _check_key(client: Client, has_access: bool, source: str) -> Check:
    if not has_access:
        return Check(
            "key", "failed", source, "Set NIGHTPRESS_API_KEY, or run as the person who started `nightpress up`."
        )
    try:
        client.me()
    except (ApiError, ClientError) as error:
        return Check(
            "key", "failed", f"{error.message} (key from {source})", error.hint or "Ask the operator for a new key."
        )
    return Check("key", "ok", f"accepted, from {source}")


def _check_workers(client: Client) -> Check:
    try:
        alive = [worker for worker in client.workers() if worker.state != "lost"]
        served = {worker.queue for worker in alive} | {"cpu" for worker in alive if worker.cpu_jobs}
        unserved = [queue for queue in client.queues() if queue.queued and queue.name not in served]
    except ApiError as error:
        return Check("workers", "warning", error.message, error.hint)
    found = ", ".join(f"{worker.queue} on {worker.host} ({worker.state})" for worker in alive) or "none; jobs will wait"
    if unserved:
        waiting = " and ".join(f"{queue.queued} waiting in the queue {queue.name}" for queue in unserved)
        starts = " or ".join(
            f"`NIGHTPRESS_WORKER_QUEUE={queue.name} python -m nightpress.worker`" for queue in unserved
        )
        return Check(
            "workers", "failed", f"{found}; {waiting}, which no worker serves", f"Start a worker with {starts}."
        )
    if not alive:
        return Check(
            "workers",
            "failed",
            found,
            "Start a worker with `python -m nightpress.worker`. Its log says why it can't start.",
        )
    return Check("workers", "ok", found)


def _check_disk(settings: Settings) -> Check:
    place = next(folder for folder in (settings.data_dir, *settings.data_dir.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    found = f"{output.size_text(free)} free at {place}"
    if free < _LOW_DISK:
        return Check(
            "disk",
            "warning",
            found,
            "Free some space, or set NIGHTPRESS_DATA_DIR to a larger disk. A job needs about three times its model's size.",
        )
    return Check("disk", "ok", found)


def _check_isolation(settings: Settings) -> Check:
    """Run the worker's own probe by its command line, because the client may not import the worker."""
    command = [sys.executable, "-P", "-m", "nightpress.worker.probe", "--tell"]
    command += [] if settings.sandbox_network else ["--keep-network"]
    try:
        missing = json.loads(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout)
    except (subprocess.SubprocessError, OSError, ValueError) as error:
        return Check("walls", "warning", f"the worker's probe of its isolation failed: {type(error).__name__}")
    if not missing:
        return Check("walls", "ok", "jobs are isolated from all that they don't need")
    found = "; ".join(f"{what} ({why})" for what, why in missing.items())
    return Check("walls", "warning", f"jobs are not isolated from: {found}", "See docs/security.md, Walls.")


_PROBE = """
import json, torch
gpus = [torch.cuda.get_device_properties(at) for at in range(torch.cuda.device_count())]
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda, "gpus": [[gpu.name, gpu.total_memory] for gpu in gpus]}))
"""


def _check_torch() -> Iterator[Check]:
    if importlib.util.find_spec("torch") is None:
        yield Check(
            "torch",
            "warning",
            "not installed: this machine can submit jobs, but not press models itself",
            "`pip install 'nightpress[compress]' -r requirements-cpu.txt`",
        )
        return
    versions = [f"{name} {importlib.metadata.version(name)}" for name in _CONSUMERS if _installed(name)]
    missing = [name for name in _CONSUMERS if not _installed(name)]
    try:
        # In a process of its own: a broken driver can crash the import.
        seen = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=60, check=True)
    except (subprocess.SubprocessError, OSError) as error:
        yield Check(
            "torch",
            "failed",
            f"installed, but it can't be imported: {type(error).__name__}",
            "Reinstall it: `pip install --force-reinstall -r requirements-cpu.txt`",
        )
        return
    probed = json.loads(seen.stdout)
    found = ", ".join([f"torch {probed['torch']}", *versions])
    if missing:
        yield Check(
            "torch", "warning", f"{found}; missing {', '.join(missing)}", "`pip install 'nightpress[compress]'`"
        )
    else:
        yield Check("torch", "ok", found)
    yield check_gpu(driver=_NVIDIA_DRIVER.exists(), cuda=probed["cuda"], gpus=probed["gpus"])


def check_gpu(*, driver: bool, cuda: str | None, gpus: list[tuple[str, int]]) -> Check:
    """Compare the GPUs that torch finds with the driver.

    `driver`: whether NVIDIA's driver is loaded. `cuda`: the version that torch was built for. `gpus`: names and bytes of memory.
    """
    if gpus:
        return Check("GPU", "ok", ", ".join(f"{name} with {output.size_text(memory)}" for name, memory in gpus))
    if not driver:
        return Check("GPU", "ok", "none; none is needed: jobs of the queue cpu run here")
    if cuda is None:
        return Check(
            "GPU",
            "warning",
            "NVIDIA's driver is loaded, but torch is its CPU build",
            "Install torch's CUDA build: docs/how-to/gpu-worker.md has the command.",
        )
    return Check(
        "GPU",
        "warning",
        f"NVIDIA's driver is loaded, but torch, built for CUDA {cuda}, finds no GPU",
        f"Is the driver new enough for CUDA {cuda}? `nvidia-smi` prints its newest. Does CUDA_VISIBLE_DEVICES hide the GPU?",
    )


_VLLM_PROBE = """
import json, torch, vllm
from vllm.platforms import current_platform
print(json.dumps({"vllm": vllm.__version__, "torch": torch.__version__, "platform": current_platform.device_type}))
"""


def check_vllm(python: Path | None) -> Check:
    """Import vLLM with the interpreter that NIGHTPRESS_VLLM_PYTHON names, without letting it report its use to anybody."""
    if python is None:
        return Check("vLLM", "ok", "NIGHTPRESS_VLLM_PYTHON is not set: artifacts for vLLM are not run in it")
    quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    command = [str(python), "-I", "-c", _VLLM_PROBE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True, env=os.environ | quiet)
        found = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, OSError, ValueError, IndexError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        why = said[-1][:300] if said else type(error).__name__
        return Check(
            "vLLM",
            "failed",
            f"{python} can't import it: {why}",
            "Make its environment anew with `make vllm`, or unset NIGHTPRESS_VLLM_PYTHON.",
        )
    where = {"cuda": "on the GPU", "cpu": "on the processor"}.get(found["platform"], f"on {found['platform']}")
    return Check("vLLM", "ok", f"vllm {found['vllm']}, torch {found['torch']}, {where}")


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
