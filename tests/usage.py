"""Runs the program that a report shows for an artifact, as a reader of the report would."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from nightpress.core.compress.runners.transformersjs_runner import find_node
from nightpress.core.handoff.report import Subject


def run_usage(artifact: Subject, folder: Path) -> str:
    """What the program prints when it is run in the folder that holds the artifact's folder."""
    assert artifact.usage, artifact.name
    command, environment = [sys.executable, "-I", "-c", artifact.usage], dict(os.environ)
    if artifact.format == "transformers.js":
        command = [find_node(), "-e", artifact.usage]
        environment["NODE_PATH"] = str(Path(sys.prefix) / "node_modules")
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{artifact.usage}\n{done.stderr[-3000:]}"
    return done.stdout


def run_here(program: str, folder: Path) -> tuple[str, dict[str, Any]]:
    """What a Python program prints in that folder, and its variables at its end. It runs in this process, which has its libraries loaded."""
    printed, variables = io.StringIO(), {"__name__": "__main__"}
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        exec(compile(program, "the program of a report", "exec"), variables)
    return printed.getvalue(), variables
