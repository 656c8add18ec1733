"""The `static-int8` pass alone on encoders that you have: how near it comes, what it costs, and its longest silence.

    python -m bench.static_search FOLDER … [--bits 7 8] [--min-cosine 0.997] [--threads 2]

Each folder is traced, then rounded once for each number of bits: 7 is what a processor without VNNI needs. Memory is anonymous, of a process of its
own for each run, beside the plan's estimate for the whole job.
"""

import argparse
import multiprocessing
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from nightpress.core.compress.evaluate import quality
from nightpress.core.compress.graph import tracing
from nightpress.core.compress.passes import PassContext
from nightpress.core.compress.passes.static_int8 import static_int8
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.passes import StaticInt8
from nightpress.core.recipes.plan import make_plan


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.static_search", description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--bits", type=int, nargs="+", default=[7, 8])
    parser.add_argument("--min-cosine", type=float, default=0.997)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    print("| model | bits | cosine | in float | s | CPU s | peak, MiB | estimate, MiB | longest silence, s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for folder in options.folders:
        for bits in options.bits:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(pool.apply(measure, (folder, bits, options.min_cosine, options.threads)), flush=True)
    return 0


def measure(folder: Path, bits: int, least: float, threads: int) -> str:
    """A row of the table."""
    options = {"pass": "static-int8", "weight_bits": bits, "min_cosine": least}
    recipe = parse_recipe(
        {
            "name": "bench",
            "passes": [options],
            "exports": ["onnx"],
            "calibration": {"samples": 64, "length": 128},
            "evaluate": [{"metric": "fidelity", "samples": 8, "length": 48}],
        }
    )
    header = inspect_model(FolderFiles(folder))
    estimate = make_plan(recipe, header).estimate
    assert estimate is not None
    watch = _Watch()
    with tempfile.TemporaryDirectory(prefix="nightpress-bench-") as work:
        context = PassContext(
            header=header,
            work_dir=Path(work),
            threads=threads,
            calibration=recipe.calibration,
            progress=lambda _done, text: watch.said(text),
        )
        trial = quality.prepare(recipe, header, folder, {}, threads=threads)
        traced = tracing.trace(folder, header, trial.task.sets[0].sequences, context)
        watch.start()
        started, spent = time.monotonic(), time.process_time()
        _, record = static_int8(folder, traced, StaticInt8.model_validate(options), context)
        seconds, spent = time.monotonic() - started, time.process_time() - spent
    found: dict[str, Any] = record.summary
    layers = found["matrices"] + found["attention_scores"] + len(found["left_in_float"])
    return (
        f"| {folder.name} | {bits} | {found['cosine_held_apart']:.5f} | {len(found['left_in_float'])} of {layers} | {seconds:.0f} "
        f"| {spent:.0f} | {watch.peak >> 20} | {estimate.memory_bytes >> 20} | {watch.silence:.1f} |"
    )


class _Watch:
    """The most anonymous memory of this process, and the longest time between two messages."""

    def __init__(self) -> None:
        self.peak, self.silence, self._last = 0, 0.0, time.monotonic()

    def start(self) -> None:
        self.silence, self._last = 0.0, time.monotonic()
        threading.Thread(target=self._look, daemon=True).start()

    def said(self, _text: str) -> None:
        now = time.monotonic()
        self.silence, self._last = max(self.silence, now - self._last), now

    def _look(self) -> None:
        while True:
            status = Path("/proc/self/status").read_text().splitlines()
            kilobytes = next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))
            self.peak = max(self.peak, kilobytes * 1024)
            time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main())
