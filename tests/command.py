"""The `nightpress` command, run in the test's own process: starting Python takes longer than most subcommands."""

import contextlib
import functools
import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import typer

from nightpress.client.cli.main import main
from tests.face import Face
from tests.service import ROOT

#: Typer builds all subcommands at each call, which takes longer than most of them. A process of its own does it once, as here.
built_once = functools.cache(typer.main.get_command)


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def run(face: Face, *arguments: str, cwd: Path = ROOT, stdin: str = "", **env: str) -> Done:
    """Run the command with the settings of an installation. Returns its status and output."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(os.environ, face.environment() | env, clear=True),
        mock.patch.object(typer.main, "get_command", built_once),
        mock.patch.object(sys, "argv", ["nightpress", *arguments]),
        mock.patch.object(sys, "stdin", io.StringIO(stdin)),
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    return Done(int(ended.value.code or 0), out.getvalue(), err.getvalue())
