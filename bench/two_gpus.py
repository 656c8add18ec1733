"""Calibrated passes and training on one GPU and on two, in some ten minutes: what `blocks_gpu` and `train_gpu` measure, in one call.

    NIGHTPRESS_BENCH_DISK=/dev/shm python -m bench.two_gpus [--out FOLDER] [--only PART …] [--shapes SHAPE …]

Parts: `alone` (one GPU: GPTQ, AWQ and SparseGPT of the 8B shape and GPTQ of the 70B shape on the first; beside them, on the second, a mixture's
GPTQ and AWQ and GPTQ of a DeepSeek-V3's layers), `together` (the 8B shape and the mixture on both GPUs) and `train` (FSDP2). Figures are
written to FOLDER/blocks_gpu.json after each measurement, so that a run that is cut off leaves what it has.

A model has six layers (70B four, DeepSeek-V3 three), 128 × 2048 tokens run through it, and seconds a layer are those between the starts of
the second and the last. With one GPU, `alone` measures all its shapes in turn. A run with few tokens comes first and compiles the kernels.
Every measurement has a limit; then its processes write where they are, and the next one begins. The disk needs some 90 GB, of which 68 are
for DeepSeek-V3's layers, in bfloat16 as they are opened.
llm-compressor's own run on the same GPUs: `bench.peer_llmcompressor_gpu --gpus 2`.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench import blocks_gpu, headers
from bench.limits import CutOffError, limited, say
from bench.record import RESULTS, Figure, keep, make_parser
from nightpress.core.compress.model.checkpoint import write_index
from nightpress.core.compress.ranks.launch import Ranks
from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.inspect import FolderFiles, inspect_model

GPTQ, AWQ, SPARSEGPT = "gptq-w4a16-default", "awq-w4a16-default", "sparsegpt-2:4"
#: GPU → shapes, one after the other, and their methods.
ALONE: list[list[tuple[str, list[str]]]] = [
    [("8b", [GPTQ, AWQ, SPARSEGPT]), ("70b", [GPTQ])],
    [("moe-wide", [GPTQ, AWQ]), ("deepseek-v3", [GPTQ])],
]
TOGETHER = [("8b", [GPTQ, AWQ, SPARSEGPT]), ("moe-wide", [GPTQ, AWQ])]
LAYERS = {"8b": 6, "moe-wide": 6, "70b": 4, "deepseek-v3": 3}
BARS = {"8b": ">= 1.85", "moe-wide": ">= 1.9"}  #: the speed of two GPUs over that of one
LIMITS = {"deepseek-v3": 420.0, "70b": 90.0}  #: seconds of a measurement
LIMIT = 45.0  #: of the others
PART_LIMITS = {"alone": 600.0, "together": 150.0}  #: writing DeepSeek-V3's layers takes 160 of them
SAMPLES, LENGTH, VOCABULARY = 128, 2048, 32000
PARTS = ("alone", "together", "train")
_DEEPSEEK_LAYERS = 61
_FIGURES = "FIGURES "


def title_of(shape: str, gpus: int) -> str:
    """What the names of figures begin with. Figures of `blocks_gpu` have no number of GPUs: they were taken on another machine."""
    return f"{shape} on {gpus} GPU{'s' if gpus > 1 else ''}"


def write_deepseek(folder: Path, layers: int) -> None:
    """Write DeepSeek-V3's layers with experts, with random weights in bfloat16, a shard for each GiB."""
    from transformers import DeepseekV3Config

    folder.mkdir(parents=True)
    DeepseekV3Config(
        num_hidden_layers=layers,
        first_k_dense_replace=0,
        vocab_size=VOCABULARY,
        max_position_embeddings=8192,
        architectures=["DeepseekV3ForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(folder)
    waiting: dict[str, torch.Tensor] = {}

    def write() -> None:
        save_file(waiting, folder / f"model-{sum(1 for _ in folder.glob('*.safetensors')):03}.safetensors")
        waiting.clear()

    for name, _, size in headers.tensors(layers, dense=0, vocabulary=VOCABULARY):
        if name.endswith("_scale_inv"):
            continue
        weight = torch.randn(size, device="cuda") * 0.02 if len(size) > 1 else torch.ones(size, device="cuda")
        waiting[name] = weight if name.endswith("bias") else weight.bfloat16()
        if sum(tensor.nbytes for tensor in waiting.values()) > 2**30:
            write()
    write()
    write_index(folder)


class Marks:
    """Notes when each block begins. `tell` is a run's progress."""

    def __init__(self, what: str) -> None:
        self._what = what
        self.began: list[float] = []

    def tell(self, _fraction: float, message: str) -> None:
        if re.fullmatch(r"block \d+ of \d+", message):
            self.began.append(time.perf_counter())
            say(f"{self._what}: {message}")

    @property
    def seconds(self) -> float:
        """Seconds a layer, between the starts of the second block and the last."""
        return (self.began[-1] - self.began[1]) / (len(self.began) - 2)


class HostPeak(threading.Thread):
    """The largest resident memory of this process, in bytes, while it runs: without mapped files, and with them."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._peaks, self._over = (0, 0), threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.2):
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            anonymous, every = (1024 * int(status[key].split()[0]) for key in ("RssAnon", "VmRSS"))
            self._peaks = max(self._peaks[0], anonymous), max(self._peaks[1], every)

    def stop(self) -> tuple[int, int]:
        self._over.set()
        self.join()
        return self._peaks


def measure(shape: str, methods: Sequence[str], gpus: int, folder: Path, tell: Callable[[list[Figure]], None]) -> None:
    """Measure methods on a shape, in this process or in one for each GPU. `tell` gets the figures of each."""
    model, title = folder / shape, title_of(shape, gpus)
    if not model.exists():
        say(f"{shape}: writing")
        if shape == "deepseek-v3":
            write_deepseek(model, LAYERS[shape])
        else:
            blocks_gpu.write_model(model, blocks_gpu.SHAPES[shape], LAYERS[shape], VOCABULARY)
    if gpus == 1 and shape in blocks_gpu.SHAPES:
        floor = blocks_gpu.floor(blocks_gpu.SHAPES[shape], SAMPLES, LENGTH)
        tell([Figure(f"{title} floor/{what}/seconds", round(taken, 3), "s a layer") for what, taken in floor.items()])
    torch.cuda.empty_cache()
    ids = torch.randint(0, VOCABULARY, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))
    ranks = Ranks(gpus, folder / f"ranks-{title}", device="cuda", threads=torch.get_num_threads())
    with ranks if gpus > 1 else nullcontext() as processes:
        for method in methods:
            what = f"{title}/{method}"
            try:
                with limited(what, LIMITS.get(shape, LIMIT), processes):
                    tell(_measured(what, method, model, ids, processes, gpus))
            except CutOffError as error:
                say(str(error))
            except Exception as error:  # the other measurements go on
                say(f"{what}: {type(error).__name__}: {error}")


def _measured(what: str, method: str, model: Path, ids: torch.Tensor, ranks: Ranks | None, gpus: int) -> list[Figure]:
    options, scratch = blocks_gpu.OPTIONS[method], model.parent / f"run-{what.replace('/', '-')}"
    if model.name != "deepseek-v3":  # a layer of it takes too long to be pressed twice
        blocks_gpu.press(options, model, scratch, ids[: 8 * gpus], ranks)
    marks, host = Marks(what), HostPeak()
    host.start()
    found = blocks_gpu.press(options, model, scratch, ids, ranks, marks.tell)
    anonymous, every = host.stop()
    shutil.rmtree(scratch, ignore_errors=True)
    cost = options.cost(inspect_model(FolderFiles(model)), Calibration(samples=SAMPLES, length=LENGTH))
    estimated = cost.each_gpu(gpus) / 2**30
    figures = [
        Figure(f"{what}/seconds", round(marks.seconds, 3), "s a layer"),
        Figure(f"{what}/peak", round(found["peak_gib"], 2), "GiB of the GPU"),
        Figure(f"{what}/estimated", round(estimated, 2), "GiB of the GPU"),
        Figure(f"{what}/estimated_over_peak", round(estimated / found["peak_gib"], 2)),
    ]
    if model.name == "deepseek-v3":
        figures.append(
            Figure(f"{what}/hours", round(_DEEPSEEK_LAYERS * marks.seconds / 3600, 2), "h for the whole model")
        )
    if ranks is None:
        figures += [
            Figure(f"{what}/host", round(anonymous / 2**30, 1), "GiB of the host, without mapped files"),
            Figure(f"{what}/host_with_files", round(every / 2**30, 1), "GiB of the host"),
        ]
    return figures


class Keeper:
    """Writes figures as they come, from several processes, with the ratio of two GPUs to one."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._lock = folder, threading.Lock()
        self._seconds: dict[str, float] = {}

    def take(self, figures: list[Figure]) -> None:
        with self._lock:
            for figure in list(figures):
                if not figure.name.endswith("/seconds"):
                    continue
                self._seconds[figure.name] = figure.value
                title, *rest = figure.name.split("/")
                shape = title.split(" ")[0]
                alone = self._seconds.get("/".join([title_of(shape, 1), *rest]))
                if title == title_of(shape, 2) and alone:
                    name = figure.name.removesuffix("seconds") + "ratio"
                    figures.append(Figure(name, round(alone / figure.value, 2), "of one GPU's speed", bar=BARS[shape]))
            keep("blocks_gpu", figures, self._folder)

    def listen(self, child: "subprocess.Popen[str]") -> None:
        """Take the figures that a child of this program prints, until it ends."""
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith(_FIGURES):
                self.take([Figure(**figure) for figure in json.loads(line.removeprefix(_FIGURES))])


def run_part(part: str, work: list[tuple[list[tuple[str, list[str]]], str]], folder: Path, keeper: Keeper) -> None:
    """Run children side by side, each with its shapes on its GPUs. What is not done after the part's limit is left out."""
    children, threads = [], []
    for shapes, visible in work:
        command = [sys.executable, "-m", "bench.two_gpus", "--child", json.dumps(shapes), visible, str(folder)]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": visible, "PYTHONUNBUFFERED": "1"}
        child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        children.append(child)
        threads.append(threading.Thread(target=keeper.listen, args=(child,)))
        threads[-1].start()
    ends = time.monotonic() + PART_LIMITS[part]
    for child in children:
        try:
            child.wait(max(1.0, ends - time.monotonic()))
        except subprocess.TimeoutExpired:
            say(f"{part}: cut off")
            child.kill()  # its processes end with it
    for thread in threads:
        thread.join()


def main() -> int:
    parser = make_parser("two_gpus", __doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="a folder for the figures")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shapes", nargs="*", choices=list(LAYERS), default=list(LAYERS), help="of `alone`")
    parser.add_argument("--child", nargs=3, metavar=("SHAPES", "GPUS", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        shapes, visible, folder = options.child
        for shape, methods in json.loads(shapes):
            measure(shape, methods, len(visible.split(",")), Path(folder), _print)
        return 0
    gpus = torch.cuda.device_count()
    if gpus < (1 if options.only == ["alone"] else 2):
        print("skipped: there are no two CUDA devices", file=sys.stderr)
        return 0
    keeper = Keeper(options.out)
    with tempfile.TemporaryDirectory(dir=os.environ.get("NIGHTPRESS_BENCH_DISK")) as scratch:
        if "alone" in options.only:
            rows = [[row for row in shapes if row[0] in options.shapes] for shapes in ALONE]
            work = list(zip(rows, "01", strict=True)) if gpus > 1 else [(rows[0] + rows[1], "0")]
            run_part("alone", work, Path(scratch), keeper)
        for shape in ("70b", "deepseek-v3"):
            shutil.rmtree(Path(scratch) / shape, ignore_errors=True)
        if "together" in options.only:
            run_part("together", [(TOGETHER, "0,1")], Path(scratch), keeper)
    if "train" in options.only:
        subprocess.run([sys.executable, "-m", "bench.train_gpu", "--gpus", "2", "--out", str(options.out)])
    return 0


def _print(figures: list[Figure]) -> None:
    print(_FIGURES + json.dumps([asdict(figure) for figure in figures]), flush=True)


if __name__ == "__main__":
    sys.exit(main())
