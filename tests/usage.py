"""Runs the program that a report shows for an artifact, as a reader of the report would."""

import os
import subprocess
import sys
from pathlib import Path

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
