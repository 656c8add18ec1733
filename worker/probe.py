"""Finds out which parts of the sandbox ("walls") work on this machine, by building them around an idle process.

`python -m nightpress.worker.probe --tell` prints as JSON which walls do not work, and why. With a job's folder as its argument, the module
runs as the process that builds the walls.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

from nightpress.worker import sandbox
from nightpress.worker.enclosure import enclose
from nightpress.worker.walls import CALLS, FILES, Walls

_PATIENCE_S = 60.0


def probe_walls(job_dir: Path, *, network: bool) -> Walls:
    """The walls that a job would have on this machine. They are built in a separate process, because they can't be removed again.

    job_dir: the folder in which the probe runs; it is created before and removed afterwards.
    network: whether jobs keep the network, as with NIGHTPRESS_SANDBOX_NETWORK=false.
    """
    command = [sys.executable, "-P", "-m", "nightpress.worker.probe", *(["--keep-network"] if network else [])]
    sandbox.prepare_folder(job_dir)
    env = sandbox.child_environment(job_dir, 1)
    try:
        said = subprocess.run(
            [*command, str(job_dir)], env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PATIENCE_S
        )
        return Walls(json.loads(said.stdout))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return Walls({FILES: f"the probe failed: {error}", CALLS: f"the probe failed: {error}"})
    finally:
        shutil.rmtree(job_dir, ignore_errors=True)


def main() -> None:
    if "--tell" in sys.argv:
        with tempfile.TemporaryDirectory(prefix="nightpress-walls-") as folder:
            walls = probe_walls(Path(folder).resolve() / "run", network="--keep-network" in sys.argv)
        print(json.dumps(walls.down))  # noqa: T201
        return

    def work(walls: Walls) -> NoReturn:
        os.write(1, json.dumps(walls.down).encode())
        os._exit(0)

    inner = enclose(Path(sys.argv[-1]), work, network="--keep-network" in sys.argv)
    inner.wait()
    inner.end()


if __name__ == "__main__":
    main()
