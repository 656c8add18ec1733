"""`nightpress up` and `nightpress down`: start and stop the embedded stack on this machine."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import psutil
import typer

from nightpress.client.cli import output
from nightpress.client.cli.session import Session, takes_session
from nightpress.client.client import Client
from nightpress.client.errors import ClientError, UnreachableError
from nightpress.core.settings import Settings, load_settings
from nightpress.core.stack_state import StackState

_MODULE = "nightpress.worker.devstack"


def add_to(app: typer.Typer) -> None:
    app.command("up", rich_help_panel="This machine")(takes_session(up))
    app.command("down", rich_help_panel="This machine")(takes_session(down))


def up(
    session: Session,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Return when the stack is ready, and let it run.")
    ] = False,
    patience: Annotated[float, typer.Option(help="Seconds to wait with --detach until the stack is ready.")] = 60.0,
) -> None:
    """Run the whole service on this machine: API, worker, control process, broker, SQLite and a folder for files. Ctrl-C stops it."""
    settings = load_settings()
    if not detach:
        raise typer.Exit(_run_in_foreground())
    if running_stack(settings) is None:
        process = start_stack(settings)
        await_ready(process, settings, patience)
    url = StackState.load(settings.data_dir).api_url
    if session.json:
        output.print_json({"api_url": url, "key_file": str(settings.key_file), "data_dir": str(settings.data_dir)})
    else:
        output.say(
            f"Nightpress answers at {url}; its key is in {settings.key_file}. `nightpress web` opens its page, `nightpress down` stops it."
        )


def _run_in_foreground() -> int:
    process = subprocess.Popen([sys.executable, "-m", _MODULE])
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the stack got the same Ctrl-C and stops its parts
            continue


def down(session: Session) -> None:
    """Stop the embedded stack of this machine. Its jobs and results stay; jobs go on at the next `nightpress up`."""
    settings = load_settings()
    stack = running_stack(settings)
    if stack is not None:
        stop_stack(stack)
    if session.json:
        output.print_json({"stopped": stack is not None})
    else:
        output.say("Nightpress has stopped." if stack is not None else f"No stack of {settings.data_dir} is running.")


def running_stack(settings: Settings) -> psutil.Process | None:
    """The process of the embedded stack; None where it does not run.

    It is found by the stored process ids and checked by its command line, because the system uses ids again.
    """
    for pid in StackState.load(settings.data_dir).pids.values():
        try:
            process = psutil.Process(pid)
            for ancestor in (process, *process.parents()):
                if _MODULE in ancestor.cmdline() and ancestor.status() != psutil.STATUS_ZOMBIE:
                    return ancestor
        except psutil.Error:
            continue
    return None


def stop_stack(stack: psutil.Process, patience_s: float = 30.0) -> None:
    """Ask the stack to end and wait. Raises ClientError where it has not ended after `patience_s`."""
    stack.send_signal(signal.SIGTERM)
    try:
        stack.wait(patience_s)
    except psutil.TimeoutExpired as error:
        raise ClientError(
            f"The stack (process {stack.pid}) has not ended after {patience_s:g} s.",
            hint=f"A job may still be stopping. Wait and look again, or end it with `kill -9 {stack.pid}`: no job is lost.",
        ) from error


def start_stack(settings: Settings, environment: Mapping[str, str] | None = None) -> "subprocess.Popen[bytes]":
    """Start the stack in a session of its own. It writes its log to data_dir/devstack.log."""
    settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    log = log_of(settings)
    with log.open("ab") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", _MODULE],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
        )


def log_of(settings: Settings) -> Path:
    return settings.data_dir / "devstack.log"


def await_ready(process: "subprocess.Popen[bytes]", settings: Settings, patience_s: float) -> Client:
    """Return a client of the stack once its API, broker and storage answer and a worker has reported.

    Raises ClientError with the end of the stack's log where it ends or is not ready after `patience_s`.
    """
    deadline = time.monotonic() + patience_s
    client: Client | None = None
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ClientError(
                f"The stack ended while it started (status {process.returncode}).", hint=_log_end(settings)
            )
        state = StackState.load(settings.data_dir)
        # The state of a killed stack may name another port, and be older than the key file.
        if client is None and state.pids.get("stack") == process.pid:
            client = Client(state.api_url, settings.key_file.read_text().strip(), retries=0)
        if client is not None and _answers(client):
            return client
        time.sleep(0.1)
    process.terminate()
    raise ClientError(f"The stack was not ready after {patience_s:g} s.", hint=_log_end(settings))


def _answers(client: Client) -> bool:
    try:
        return client.ready().status == "ok" and bool(client.workers())
    except UnreachableError:
        return False


def _log_end(settings: Settings, lines: int = 12) -> str:
    try:
        text = log_of(settings).read_text(errors="replace")
    except OSError:
        return "There is no log."
    return "Its log ends:\n" + "\n".join(text.splitlines()[-lines:])
