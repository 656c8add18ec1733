"""A whole job on a GPU, in a worker's child: the seconds of each phase, and the peaks of host and GPU memory.

    python -m bench.whole_job [--shape 8b] [--layers 32] [--samples 128] [--length 2048] [--evaluate-on auto|cpu]

The job is the recipe `int4-lm` on a Llama with random weights. It runs from the start of the child
to its manifest; the model's files are linked into its folder, and nothing is uploaded. `floor` is the time to read the model's files three
times from the page cache, as the job does at least: to check them, to solve, and to measure.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from bench.estimates import random_llama, watch, words
from bench.record import Figure, finish, make_parser
from nightpress.client.cli.press import write_job
from nightpress.client.folders import read_model_folder
from nightpress.core.handoff.report import REPORT_FILE, Report
from nightpress.core.handoff.spec import OUT_DIR
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


def measure(source: Path, root: Path, recipe: Recipe) -> tuple[dict[str, float], Report]:
    """Run the job. Returns its wall seconds and peak of host memory in bytes, and its report."""
    child = ChildProcess(root, threads=_THREADS, network=True)
    try:
        sets = {"words": words(root / "words.txt", recipe.calibration.samples * recipe.calibration.length)}
        write_job(child.job_dir, read_model_folder(source), recipe, sets, device="cuda", threads=_THREADS)
        measured = watch(child)
        return measured, Report.model_validate_json((child.job_dir / OUT_DIR / REPORT_FILE).read_bytes())
    finally:
        child.kill()
        child.remove()


def figures_of(row: str, source: Path, root: Path, recipe: Recipe) -> list[Figure]:
    estimate = make_plan(recipe, inspect_model(FolderFiles(source)), [Seat("gpu", 0, _THREADS)]).estimate
    assert estimate is not None
    floor = _READ * read_seconds(source)
    measured, report = measure(source, root, recipe)
    [artifact] = report.artifacts
    proof = sum(report.phases.get(phase, 0.0) for phase in ("baseline", "verifying", "evaluating"))
    on_gpu = [subject.peak_gpu_bytes or 0 for subject in (report.source, artifact)]
    solving = max(record.peak_gpu_bytes or 0 for record in report.passes)
    figures = [
        Figure(f"{row}/seconds", round(measured["wall_seconds"], 1), "s", bar="<= 100"),
        *(Figure(f"{row}/{phase}", round(seconds, 1), "s") for phase, seconds in report.phases.items()),
        Figure(f"{row}/proof", round(100 * proof / measured["wall_seconds"], 1), "% of the job", bar="<= 50"),
        Figure(f"{row}/floor", round(floor, 1), "s"),
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


def main() -> int:
    parser = make_parser("whole_job", __doc__)
    parser.add_argument("--shape", default="8b", help="a shape of bench.blocks_gpu")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--evaluate-on", choices=("auto", "cpu"), default="auto")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        source = random_llama(Path(root) / "model", f"{options.shape} {options.layers}")
        row = f"{options.shape}-{options.layers}{'-on-cpu' if options.evaluate_on == 'cpu' else ''}"
        figures = figures_of(row, source, Path(root), recipe_of(options))
    return finish("whole_job", figures, parser, options, choices=("shape", "layers", "evaluate_on"))


if __name__ == "__main__":
    sys.exit(main())
