"""Calibrated passes on a CPU in one process and in several: seconds of the blocks executor on a real small language model.

    python -m bench.ranks_cpu [--method NAME …] [--processes 2] [--samples 32] [--length 512] [--rounds 3]
    python -m bench.ranks_cpu --method gptq --samples 8    (two minutes)

One process has all threads, and several share them out. Each measured run is a whole pass: reading, calibrating, solving, writing. Starting
the processes and importing the libraries is not measured: a run with few texts comes first. The runs of both kinds take turns. The figure is
the median of the rounds, and its spread is the lowest and the highest. Bar: two processes on two cores are no slower than one by more than
10%: on a CPU they bring no speed, and this shows that their exchange costs little. CPU seconds are those of all processes, and what they send
is counted on the loopback device: on a machine where others use it, that figure is too high. GPUs: `bench.blocks_gpu --gpus`.
"""

import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.blocks_cpu import METHODS, prepare
from bench.processes import cpu_seconds
from bench.record import Figure, finish, make_parser
from nightpress.core.compress.passes import MODEL_PASSES, PassContext, blockwise
from nightpress.core.compress.ranks.launch import Ranks
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe

USUAL = ("gptq", "awq", "sparsegpt-2:4", "wanda-2:4", "smoothquant")


@dataclass(frozen=True)
class Taken:
    """What a run has taken."""

    seconds: float
    cpu_seconds: float
    sent: int  #: bytes over the loopback device


def press(model: Path, name: str, ids: torch.Tensor, scratch: Path, ranks: Ranks | None) -> Taken:
    """Run a method of `blocks_cpu` once."""
    shutil.rmtree(scratch, ignore_errors=True)
    options = METHODS[name]
    export = "safetensors" if options["pass"] in {"sparsegpt", "wanda"} else "compressed-tensors"
    recipe = parse_recipe({"name": "bench", "passes": [options], "exports": [export]})
    blockwise.calibration_samples = lambda *_: {"input_ids": ids}
    context = PassContext(
        header=inspect_model(FolderFiles(model)),
        work_dir=scratch / "work",
        threads=torch.get_num_threads(),
        ranks=ranks,
    )
    start, used, sent = time.perf_counter(), cpu_seconds(os.getpid()), _over_loopback()
    MODEL_PASSES[options["pass"]](model, scratch / "out", recipe.passes[0], context)
    return Taken(time.perf_counter() - start, cpu_seconds(os.getpid()) - used, _over_loopback() - sent)


def _over_loopback() -> int:
    """Bytes that the loopback device has carried."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split(":")[1].split()[0]) for line in lines if line.strip().startswith("lo:"))


def measure(name: str, model: Path, ids: torch.Tensor, scratch: Path, ranks: Ranks, rounds: int) -> list[Figure]:
    several = f"{ranks.size}_processes"
    sides: dict[str, Ranks | None] = {"1_process": None, several: ranks}
    for side in sides.values():
        press(model, name, ids[: ranks.size], scratch, side)
    taken: dict[str, list[Taken]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, given in sides.items():
            taken[side].append(press(model, name, ids, scratch, given))
    figures = []
    for side, runs in taken.items():
        seconds = [run.seconds for run in runs]
        spread = (round(min(seconds), 2), round(max(seconds), 2))
        used = statistics.median(run.cpu_seconds for run in runs)
        figures += [
            Figure(f"{name}/{side}", round(statistics.median(seconds), 2), "s", spread),
            Figure(f"{name}/{side}_cpu", round(used, 1), "CPU seconds"),
        ]
    sent = statistics.median(run.sent for run in taken[several])
    ratios = [
        statistics.median(getattr(run, kind) for run in taken[several])
        / statistics.median(getattr(run, kind) for run in taken["1_process"])
        for kind in ("seconds", "cpu_seconds")
    ]
    return [
        *figures,
        Figure(f"{name}/sent", round(sent / 1e6), "MB between the processes"),
        Figure(f"{name}/cpu_ratio", round(ratios[1], 2), "of one process's CPU seconds"),
        Figure(f"{name}/ratio", round(ratios[0], 2), "of one process", bar="<= 1.1"),
    ]


def main() -> int:
    parser = make_parser("ranks_cpu", __doc__)
    parser.add_argument("--method", nargs="*", choices=sorted(METHODS), default=list(USUAL))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    figures: list[Figure] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        Ranks(options.processes, Path(folder) / "ranks", threads=threads) as ranks,
    ):
        prepare(Path(folder), options.samples, options.length)
        ids = _ids(Path(folder) / "calibration-0.npy")
        for name in options.method:
            figures += measure(name, Path(folder) / "model", ids, Path(folder) / "run", ranks, options.rounds)
            print(name, file=sys.stderr, flush=True)
    return finish("ranks_cpu", figures, parser, options, choices=("method",))


def _ids(path: Path) -> Any:
    import numpy as np

    return torch.from_numpy(np.load(path))


if __name__ == "__main__":
    sys.exit(main())
