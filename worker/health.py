"""Liveness check for container engines: a worker or control process touches a file in every cycle, and this reads the file's age.

`python -m nightpress.worker.health` ends with status 0 if the worker in the same container is alive; `--control`: the control process.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Literal

from nightpress.core.settings import load_settings

STALE_S = 60.0  #: twelve heartbeats of a worker

Role = Literal["worker", "control"]


def mark_alive(data_dir: Path, role: Role) -> None:
    """Record that this process has completed a cycle."""
    data_dir.mkdir(parents=True, exist_ok=True)
    _mark(data_dir, role).touch()


def age_of(data_dir: Path, role: Role) -> float:
    """Seconds since the process last completed a cycle; infinite if it never did."""
    mark = _mark(data_dir, role)
    return time.time() - mark.stat().st_mtime if mark.exists() else float("inf")


def _mark(data_dir: Path, role: Role) -> Path:
    return data_dir / f"{role}.alive"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m nightpress.worker.health", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--control", action="store_true", help="ask for the control process")
    role: Role = "control" if parser.parse_args(argv).control else "worker"
    age = age_of(load_settings().data_dir, role)
    if age > STALE_S:
        print(f"the {role} process did not get round for {age:.0f} s", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
