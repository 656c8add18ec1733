"""Printing: results to standard output, notes and progress to standard error. Text from a server is cleaned first."""

import datetime as dt
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from nightpress.client.transfers import UNWATCHED, Meter


def stdout() -> Console:
    return Console(highlight=False, markup=False, emoji=False, soft_wrap=True)


def stderr() -> Console:
    return Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


def clean(value: object, *, lines: bool = False) -> str:
    """Text without control characters, escape sequences and direction overrides: safe for a terminal, whoever wrote it."""
    text = str(value)
    if lines:
        return "\n".join(clean(line) for line in text.replace("\r\n", "\n").split("\n"))
    return "".join(character for character in text.replace("\t", " ") if character.isprintable())


def say(text: str, style: str = "") -> None:
    """Print a line of the result to standard output."""
    stdout().print(Text(clean(text, lines=True), style=style))


def note(text: str, style: str = "") -> None:
    """Print a note to standard error."""
    stderr().print(Text(clean(text, lines=True), style=style))


def fail(message: str, hint: str = "", *, reference: str = "") -> None:
    """Print an error: what happened, what to do, and the request id to quote in a report."""
    console = stderr()
    console.print(Text.assemble(("error: ", "bold red"), clean(message, lines=True)))
    if hint:
        console.print(Text.assemble(("  → ", "bold"), clean(hint, lines=True)))
    if reference:
        console.print(Text(f"  request {clean(reference)}", style="dim"))


def print_json(value: Any) -> None:
    """Print a JSON document on one line. Non-ASCII characters are escaped, so that none can control a terminal."""
    sys.stdout.write(json.dumps(_plain(value)) + "\n")
    sys.stdout.flush()


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def print_table(headers: Sequence[str], rows: Sequence[Sequence[object]], *, right: Sequence[int] = ()) -> None:
    """Print a table: with lines on a terminal, elsewhere as aligned columns that are never cut. `right`: columns aligned right."""
    headers = [clean(header) for header in headers]
    cells = [[clean(cell) for cell in row] for row in rows]
    console = stdout()
    if console.is_terminal:
        table = Table(header_style="bold")
        for index, header in enumerate(headers):
            table.add_column(header, justify="right" if index in right else "left", overflow="fold")
        for row in cells:
            table.add_row(*row)
        console.print(table)
        return
    every = [list(headers), *cells]
    widths = [max(len(row[index]) for row in every) for index in range(len(headers))]
    for row in every:
        padded = [
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        sys.stdout.write("  ".join(padded).rstrip() + "\n")


def print_fields(fields: Sequence[tuple[str, object]]) -> None:
    """Print a name and a value on each line. Empty values are left out."""
    shown = [(name, value) for name, value in fields if value not in (None, "", {}, [])]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        say(f"{name.ljust(width)}  {clean(value)}")


class _BarMeter:
    """A meter of transfers that moves a progress bar."""

    def __init__(self, progress: Progress, label: str) -> None:
        self._progress = progress
        self._task = progress.add_task(label, total=None)
        self._total = 0

    def expect(self, size: int) -> None:
        self._total += size
        self._progress.update(self._task, total=self._total)

    def advance(self, size: int) -> None:
        self._progress.advance(self._task, size)


@contextmanager
def transfer_meter(label: str, *, quiet: bool = False) -> Iterator[Meter]:
    """A meter that shows a bar on a terminal, and nothing elsewhere or where `quiet`."""
    console = stderr()
    if quiet or not console.is_terminal:
        yield UNWATCHED
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield _BarMeter(progress, label)


def job_progress() -> Progress:
    """A progress bar for a job."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%", markup=False),
        TimeElapsedColumn(),
        TextColumn("{task.fields[message]}", markup=False, style="dim"),
        console=stderr(),
        transient=True,
    )


def size_text(size: float) -> str:
    """A number of bytes in B, kB, MB, GB or TB: powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


def duration_text(seconds: float) -> str:
    """A duration in seconds, minutes or hours."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def ago_text(moment: dt.datetime | None) -> str:
    """How long ago a moment was, by this machine's clock; empty for None."""
    if moment is None:
        return ""
    seconds = max(0.0, (dt.datetime.now(dt.UTC) - moment).total_seconds())
    for limit, unit in ((60, "s"), (3600, "min"), (86400, "h")):
        if seconds < limit:
            return f"{seconds / (limit / 60 if unit != 'h' else 3600):.0f} {unit} ago"
    return f"{seconds / 86400:.0f} d ago"
