"""A whole job on a GPU, in a worker's child: the seconds of each phase, and the peaks of host and GPU memory.

    python -m bench.whole_job [--shape 8b] [--layers 32] [--samples 128] [--length 2048] [--evaluate-on auto|cpu] [--timeline] [--second]
    python -m bench.whole_job --peer-path DIR [--peer-python PYTHON] [--peer-gpu N]

The job is the recipe `int4-lm` on a Llama with random weights. It runs from the start of the child
to its manifest; the model's files are linked into its folder, and nothing is uploaded. `floor` is the time to read the model's files three
times from the page cache, as the job does at least: to check them, to solve, and to measure.

--timeline prints what the job does, second by second. --second also runs a second job on the same model, which reads the outputs of the
source that the first has measured. --peer-path also runs llm-compressor on the same model with the same settings: one process that
imports, loads, solves and saves. DIR holds llm-compressor and what it needs in its own versions; see bench/peer_llmcompressor_gpu.py.
With --peer-gpu it runs at the same time as the jobs, on another GPU of the host.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from bench.estimates import random_llama, watch, words
from bench.peer_llmcompressor_gpu import Place, run_peer
from bench.record import Figure, finish, make_parser
from nightpress.client.cli.press import write_job
from nightpress.client.folders import read_model_folder
from nightpress.core.compress.environment import give_back_gpu_memory
from nightpress.core.handoff.frames import Progress
from nightpress.core.handoff.report import REPORT_FILE, Report
from nightpress.core.handoff.source_outputs import FRESH_FILE, KEPT_FILE
from nightpress.core.handoff.spec import OUT_DIR, WORK_DIR
from nightpress.core.recipes.builtins import get_recipe
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import Recipe, parse_recipe
from nightpress.core.recipes.placement import Seat
from nightpress.core.recipes.plan import make_plan
from nightpress.worker.process import ChildProcess

GB = 1e9
_THREADS = 16
_READ = 3  #: how often a job reads each byte of the model at least
_CHUNK = 16 * 1024**2
_FIRST = "job_first"


def recipe_of(options: argparse.Namespace) -> Recipe:
    """`int4-lm`, calibrated with enough text for any length. Random weights keep no gate."""
    calibration = {"samples": options.samples, "length": options.length, "data": "words"}
    changes = {"calibration": calibration, "evaluate_on": options.evaluate_on, "device": "gpu", "gates": {}}
    return parse_recipe(get_recipe("int4-lm").model_dump(mode="json") | changes)


def read_seconds(folder: Path) -> float:
    """Seconds to read a folder's files once; they are in the page cache, since they were written just now."""
    began = time.monotonic()
    for file in folder.iterdir():
        with file.open("rb", buffering=0) as stream:
            while stream.read(_CHUNK):
                pass
    return time.monotonic() - began


def measure(
    source: Path, root: Path, recipe: Recipe, tell: Callable[[float, Progress], None] | None
) -> tuple[dict[str, float], Report]:
    """Run the job. Returns its wall seconds and peak of host memory in bytes, and its report.

    It leaves the source's outputs in `root`. If an earlier job has left them there, this one reads them.
    """
    child = ChildProcess(root, threads=_THREADS, network=True)
    kept, work = root / KEPT_FILE, child.job_dir / WORK_DIR
    try:
        sets = {"words": words(root / "words.txt", recipe.calibration.samples * recipe.calibration.length)}
        spec = write_job(child.job_dir, read_model_folder(source), recipe, sets, device="cuda", threads=_THREADS)
        if kept.exists():
            shutil.copyfile(kept, work / KEPT_FILE)
        by = _FIRST if kept.exists() else ""
        spec.model_copy(update={"keep_source": True, "source_measured_by": by}).save(child.job_dir)
        measured = watch(child, tell)
        if not kept.exists():
            shutil.copyfile(work / FRESH_FILE, kept)
        report = Report.model_validate_json((child.job_dir / OUT_DIR / REPORT_FILE).read_bytes())
        if (report.source.measurements_by or "") != by:
            raise SystemExit(f"The source was measured by {report.source.measurements_by}, not by {by or 'this job'}.")
        return measured, report
    finally:
        child.kill()
        child.remove()


def tell_line(seconds: float, frame: Progress) -> None:
    print(f"{seconds:7.1f} s  {frame.phase:10}  {frame.message}", file=sys.stderr, flush=True)


def figures_of(row: str, source: Path, recipe: Recipe, measured: dict[str, float], report: Report) -> list[Figure]:
    estimate = make_plan(recipe, inspect_model(FolderFiles(source)), [Seat("gpu", 0, _THREADS)]).estimate
    assert estimate is not None
    [artifact] = report.artifacts
    on_gpu = [subject.peak_gpu_bytes or 0 for subject in (report.source, artifact)]
    solving = max(record.peak_gpu_bytes or 0 for record in report.passes)
    figures = [
        Figure(f"{row}/seconds", round(measured["wall_seconds"], 1), "s", bar="<= 100"),
        *(Figure(f"{row}/{phase}", round(seconds, 1), "s") for phase, seconds in report.phases.items()),
        proof(f"{row}/proof", measured, report, bar="<= 50"),
        Figure(f"{row}/floor", round(_READ * read_seconds(source), 1), "s"),
        Figure(f"{row}/host_memory", round(measured["memory"] / GB, 2), "GB", bar="<= 25.8"),
        Figure(f"{row}/gpu_solving", round(solving / GB, 2), "GB"),
        Figure(f"{row}/gpu_source", round(on_gpu[0] / GB, 2), "GB"),
        Figure(f"{row}/gpu_artifact", round(on_gpu[1] / GB, 2), "GB"),
        Figure(f"{row}/seconds_estimated", round(estimate.seconds, 1), "s"),
        Figure(f"{row}/host_memory_estimated", round(estimate.memory_bytes / GB, 2), "GB"),
        Figure(f"{row}/gpu_estimated", round(estimate.gpu_bytes / GB, 2), "GB"),
    ]
    for subject in (report.source, artifact):
        figures += [
            Figure(f"{row}/{subject.name}_ms_{timing.batch}x{timing.length}", round(timing.p50_ms, 2), "ms")
            for timing in subject.timings
        ]
        figures += [
            Figure(f"{row}/{subject.name}_decode", round(timing.decode_tokens_per_s, 1), "tokens/s")
            for timing in subject.generation
        ]
    return figures


def proof(name: str, measured: dict[str, float], report: Report, *, bar: str) -> Figure:
    """The share of a job that measures the source and the artifact."""
    spent = sum(report.phases.get(phase, 0.0) for phase in ("baseline", "verifying", "evaluating"))
    return Figure(name, round(100 * spent / measured["wall_seconds"], 1), "% of the job", bar=bar)


def second_figures(row: str, measured: dict[str, float], report: Report) -> list[Figure]:
    """Of a job on the same model as an earlier one."""
    share = 100 * report.phases.get("baseline", 0.0) / measured["wall_seconds"]
    return [
        Figure(f"{row}/second_seconds", round(measured["wall_seconds"], 1), "s"),
        *(Figure(f"{row}/second_{phase}", round(seconds, 1), "s") for phase, seconds in report.phases.items()),
        Figure(f"{row}/second_baseline_share", round(share, 1), "% of the job", bar="<= 10"),
        proof(f"{row}/second_proof", measured, report, bar="<= 35"),
        Figure(f"{row}/second_host_memory", round(measured["memory"] / GB, 2), "GB"),
    ]


def peer_figures(row: str, source: Path, root: Path, recipe: Recipe, place: Place, gpu: int | None) -> list[Figure]:
    """Of llm-compressor's own one-shot GPTQ and save of the same model."""
    calibration = recipe.calibration
    told = run_peer(source, calibration.samples, calibration.length, place, out=root / "peer", gpu=gpu)
    return [
        Figure(f"{row}/peer_seconds", round(told["wall_seconds"], 1), "s"),
        *(
            Figure(f"{row}/peer_{part}", round(told[part], 1), "s")
            for part in ("importing", "loading", "solving", "saving")
        ),
        Figure(f"{row}/peer_host_memory", round(told["host_bytes"] / GB, 2), "GB"),
        Figure(f"{row}/peer_gpu_solving", round(told["gpu_bytes"] / GB, 2), "GB"),
    ]


def main() -> int:
    parser = make_parser("whole_job", __doc__)
    parser.add_argument("--shape", default="8b", help="a shape of bench.blocks_gpu")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--evaluate-on", choices=("auto", "cpu"), default="auto")
    parser.add_argument(
        "--timeline", action="store_true", help="print what the job does, with the seconds since its start"
    )
    parser.add_argument("--second", action="store_true", help="also a second job on the same model")
    parser.add_argument("--peer-path", type=Path, help="also llm-compressor, from this folder of packages")
    parser.add_argument("--peer-python", type=Path, default=Path(sys.executable), help="the interpreter of the peer")
    parser.add_argument("--peer-gpu", type=int, help="run the peer beside the jobs, on this GPU")
    options = parser.parse_args()
    tell = tell_line if options.timeline else None
    with tempfile.TemporaryDirectory() as folder:
        root, recipe = Path(folder), recipe_of(options)
        source = random_llama(root / "model", f"{options.shape} {options.layers}")
        give_back_gpu_memory()  # of the random numbers
        row = f"{options.shape}-{options.layers}{'-on-cpu' if options.evaluate_on == 'cpu' else ''}"
        place = Place(options.peer_python, options.peer_path) if options.peer_path else None
        with ThreadPoolExecutor(1) as threads:
            peer = partial(peer_figures, row, source, root, recipe, place, options.peer_gpu) if place else None
            beside = threads.submit(peer) if peer and options.peer_gpu is not None else None
            figures = figures_of(row, source, recipe, *measure(source, root, recipe, tell))
            if options.second:
                figures += second_figures(row, *measure(source, root, recipe, tell))
            if peer:
                figures += beside.result() if beside else peer()
    chosen = ("shape", "layers", "evaluate_on", "timeline", "second", "peer_path", "peer_python", "peer_gpu")
    return finish("whole_job", figures, parser, options, choices=chosen)


if __name__ == "__main__":
    sys.exit(main())
