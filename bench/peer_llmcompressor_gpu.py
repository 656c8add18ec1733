"""llm-compressor's one-shot GPTQ (W4A16, groups of 128) on GPUs: marginal seconds per layer and peak memory, beside bench.blocks_gpu.

    python -m bench.peer_llmcompressor_gpu --path DIR [--python PYTHON] [--shape 8b] [--layers 2 6] [--samples 128] [--length 2048] [--gpus 1]

DIR holds llm-compressor 0.14 and compressed-tensors 0.19, which are not our versions, and what else PYTHON's environment lacks of
bench/peer-requirements.txt. It is made by `pip install --no-deps --target DIR`. With --gpus, torchrun starts a process on each GPU, and they
share out the samples: its own distributed one-shot. The figures are recorded with those of bench.blocks_gpu. A run that takes longer than
--limit seconds is ended, with all its processes.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from bench.record import Figure, finish, make_parser

_RUN = Path(__file__).with_name("peer_llmcompressor_run.py")


@dataclass(frozen=True)
class Place:
    """Where llm-compressor is installed."""

    python: Path
    path: Path  #: a folder of packages that come before those of the interpreter


def run_peer(
    source: Path,
    samples: int,
    length: int,
    place: Place,
    *,
    gpus: int = 1,
    gpu: int | None = None,
    out: Path | None = None,
    limit: float | None = None,
) -> dict[str, float]:
    """Run it in a process of its own, or one for each GPU. Returns what it says, and `wall_seconds` of the whole process.

    gpu: the number of the one that it sees; None: it sees all that this process does. out: where the result is saved; None: it is not.
    limit: seconds after which it is ended. Raises SystemExit with what it said if it fails or is ended.
    """
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)] if gpus > 1 else []
    given = [str(_RUN), str(source), str(samples), str(length), *([] if out is None else [str(out)])]
    environment = {**os.environ, "PYTHONPATH": str(place.path), "HF_HUB_OFFLINE": "1"}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
    began = time.monotonic()
    command = [str(place.python), *start, *given]
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as peer:
        try:
            said, complained = peer.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(peer.pid, signal.SIGKILL)  # torchrun would leave its processes behind
            said, complained = peer.communicate()
    if peer.returncode:
        raise SystemExit(f"llm-compressor ended with status {peer.returncode}:\n{complained[-4000:]}")
    told: dict[str, float] = json.loads(said.strip().splitlines()[-1])
    return told | {"wall_seconds": time.monotonic() - began}


def main() -> int:
    from bench.blocks_gpu import SHAPES
    from bench.estimates import random_llama

    parser = make_parser("peer_llmcompressor_gpu", __doc__)
    parser.add_argument("--path", type=Path, required=True)
    parser.add_argument("--python", type=Path, default=Path(sys.executable))
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--layers", type=int, nargs=2, default=[2, 6])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--limit", type=float, default=240.0, help="seconds of a run")
    options = parser.parse_args()
    few, many = options.layers
    place = Place(options.python, options.path)
    with tempfile.TemporaryDirectory() as folder:
        runs = [
            run_peer(
                random_llama(Path(folder) / f"model-{layers}", f"{options.shape} {layers}"),
                options.samples,
                options.length,
                place,
                gpus=options.gpus,
                limit=options.limit,
            )
            for layers in (few, many)
        ]
    title = options.shape + (f" on {options.gpus} GPUs" if options.gpus > 1 else "")
    row = f"{title}/llm-compressor, gptq-w4a16"
    seconds = (runs[1]["solving"] - runs[0]["solving"]) / (many - few)
    figures = [
        Figure(f"{row}/seconds", round(seconds, 3), "s a layer"),
        Figure(f"{row}/peak", round(max(run["gpu_bytes"] for run in runs) / 2**30, 2), "GiB of the GPU"),
    ]
    return finish("blocks_gpu", figures, parser, options, choices=("path", "python", "shape", "gpus", "limit"))


if __name__ == "__main__":
    sys.exit(main())
