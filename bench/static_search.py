"""The `static-int8` pass alone, on given encoders: its cosine, its cost, and the longest time without a progress message.

    python -m bench.static_search FOLDER … [--bits 7 8] [--min-cosine 0.997] [--threads 2]

Each folder is traced and quantized once for each number of bits; a processor without VNNI needs 7 bits. Each run has its own process. Its
peak is that of anonymous memory, beside the plan's estimate for the whole job.
"""

import multiprocessing
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from bench.record import Figure, finish, make_parser
from nightpress.core.compress.evaluate import quality
from nightpress.core.compress.graph import tracing
from nightpress.core.compress.passes import PassContext
from nightpress.core.compress.passes.static_int8 import static_int8
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.passes import StaticInt8
from nightpress.core.recipes.plan import make_plan


def main() -> int:
    parser = make_parser("static_search", __doc__)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--bits", type=int, nargs="+", default=[7, 8])
    parser.add_argument("--min-cosine", type=float, default=0.997)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    figures: list[Figure] = []
    for folder in options.folders:
        for bits in options.bits:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                figures += pool.apply(measure, (folder, bits, options.min_cosine, options.threads))
    return finish("static_search", figures, parser, options, choices=("folders",))


def measure(folder: Path, bits: int, least: float, threads: int) -> list[Figure]:
    """Measure one model with one number of bits. `least`: the lowest accepted cosine."""
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
    row = f"models/{folder.name}, {bits} bits"
    return [
        Figure(f"{row}/cosine", round(found["cosine_held_apart"], 5)),
        Figure(f"{row}/in_float", len(found["left_in_float"]), f"of {layers} layers"),
        Figure(f"{row}/seconds", round(seconds), "s"),
        Figure(f"{row}/cpu", round(spent), "CPU seconds"),
        Figure(f"{row}/peak", watch.peak >> 20, "MiB"),
        Figure(f"{row}/estimated", estimate.memory_bytes >> 20, "MiB"),
        Figure(f"{row}/silence", round(watch.silence, 1), "s"),
    ]


class _Watch:
    """Records the peak of anonymous memory of this process, and the longest time between two progress messages."""

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
