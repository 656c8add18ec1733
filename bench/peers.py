"""Runs auto-round in its own environment, for the benches that hold us against it."""

import json
import subprocess
from pathlib import Path
from typing import Any

from bench.record import BENCH

_RESULT = "@result "  #: what the peer prints before its figures


def auto_round(python: str, source: Path, settings: dict[str, Any], tokens: Path, out: Path | None) -> dict[str, float]:
    """Quantize a model with auto-round. Returns the `seconds` of the quantization and the GPU's `peak` in bytes.

    python: of an environment with auto-round. settings: arguments of `AutoRound`. tokens: the calibration's ids, [samples, length] in a
    `.npy` file. out: a folder for the rounded model; None: it is not written. Raises RuntimeError with what the peer said if it fails.
    """
    where = "-" if out is None else str(out)
    command = [python, str(BENCH / "peer_autoround.py"), str(source), json.dumps(settings), str(tokens), where]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"auto-round failed:\n{done.stderr[-3000:]}")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith(_RESULT)]
    return dict(json.loads(line.removeprefix(_RESULT)))
