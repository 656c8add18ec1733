"""Runs the program that a report shows for an artifact, as a reader of the report would."""

import contextlib
import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from nightpress.core.compress.export import nursery
from nightpress.core.compress.export.consumer_environment import runner_environment
from nightpress.core.compress.runners.transformersjs_runner import find_node
from nightpress.core.handoff.report import Subject


def run_usage(artifact: Subject, folder: Path) -> str:
    """What the program prints when it is run in the folder that holds the artifact's folder."""
    assert artifact.usage, artifact.name
    if artifact.format == "transformers.js":
        environment = os.environ | {"NODE_PATH": str(Path(sys.prefix) / "node_modules")}
        command = [find_node(), "-e", artifact.usage]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        printed, wrong, status = done.stdout, done.stderr, done.returncode
    else:
        printed, wrong, status = _run_python(artifact.usage, folder)
    assert status == 0, f"{artifact.usage}\n{wrong[-3000:]}"
    return printed


def _run_python(program: str, folder: Path) -> tuple[str, str, int]:
    """What a program prints, its standard error and its status. A process of its own, forked from one that has imported transformers."""
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile() as errors:
        file = Path(scratch) / "program.py"
        file.write_text(program)
        environment = runner_environment("cpu", 1, Path(scratch))
        fork = nursery.start(file, file, cwd=folder, errors=errors, environment=environment)
        fork.stdin.close()
        with fork.stdout:
            printed = fork.stdout.read().decode()
        status = fork.wait()
        errors.seek(0)
        return printed, errors.read().decode(errors="replace"), status


def run_here(program: str, folder: Path) -> tuple[str, dict[str, Any]]:
    """What a Python program prints in that folder, and its variables at its end. It runs in this process, which has its libraries loaded."""
    printed, variables = io.StringIO(), {"__name__": "__main__"}
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        exec(compile(program, "the program of a report", "exec"), variables)
    return printed.getvalue(), variables
