"""Processes of benchmarks: what a new one prints, and the CPU time of one and its descendants."""

import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil


def run_python(*arguments: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    """Run this Python in a new process, and return what it printed. Its errors are shown. Raises subprocess.CalledProcessError."""
    done = subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.PIPE, text=True, env=env, cwd=cwd)
    return done.stdout


def cpu_seconds(pid: int) -> float:
    """CPU seconds of a process and all its descendants, including those that have ended. The kernel counts in hundredths of a second.

    The time of a process that has ended is added to its parent when the parent waits for it. A job's inner process is a child of an outer
    process, which waits for it at the end.
    """
    main = psutil.Process(pid)
    total = 0.0
    for process in (main, *main.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):  # it has ended since it was listed, and its parent counts it
            total += sum(process.cpu_times()[:4])  # user and system, of itself and of ended children
    return total
