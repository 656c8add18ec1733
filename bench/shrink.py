"""A real encoder without a quarter of its feed-forward channels and attention heads, beside the whole model: latency, fidelity, size.

    python -m bench.shrink [--threads 2] [--rounds 3]

The pipeline prunes all-MiniLM-L6-v2 without training. The whole and the smaller model are then timed in each runtime; a ratio always
compares within one runtime. The choice by calibration is compared with choices of the same shares by weight norms and by gradients.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.pressing import Form, press, save_float_graphs, time_by_turns
from bench.record import Figure, finish, make_parser
from nightpress.core.compress.export import onnx, openvino
from nightpress.core.recipes.models import Recipe, parse_recipe
from tests.models import minilm_dir

WAYS: dict[str, dict[str, Any]] = {
    "activation": {},
    "activation, not compensated": {"compensate": False},
    "l2": {"importance": "l2"},
    "taylor": {"importance": "taylor"},
    "activation, global": {"across": "global"},
}


def main() -> int:
    parser = make_parser("shrink", __doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nightpress-bench-") as folder:
        figures = measure(Path(folder), options.threads, options.rounds)
    return finish("shrink", figures, parser, options)


def measure(folder: Path, threads: int, rounds: int) -> list[Figure]:
    source = minilm_dir(folder)
    figures = []
    for at, (name, way) in enumerate(WAYS.items()):
        report = press(folder / str(at), source, recipe_of(way), threads)
        if not way:
            figures.append(Figure("parameters/whole", report.source.parameters or 0))
            figures.append(Figure("parameters/smaller", report.artifacts[0].parameters or 0))
        cosine = next(figure.value for figure in report.artifacts[0].measurements if figure.name == "cosine")
        figures.append(Figure(f"chosen by/{name}/cosine", round(cosine, 5)))
        seconds = sum(record.seconds for record in report.passes)
        figures.append(Figure(f"chosen by/{name}/seconds", round(seconds, 1), "s"))
    return figures + speedups(folder, source, threads, rounds)


def recipe_of(way: dict[str, Any]) -> Recipe:
    """The recipe of a way. Only the first way's result is timed, so only this result is exported to both runtimes."""
    timed = not way
    fidelity = {"metric": "fidelity", "samples": 64, "length": 128}
    latency = {"metric": "latency", "batch": [1, 8], "length": [128], "repeats": 20}
    return parse_recipe(
        {
            "name": "shrink",
            "passes": [{"pass": "channels", **way}, {"pass": "heads", **way}],
            "exports": ["onnx", "openvino"] if timed else ["onnx"],
            "calibration": {"samples": 64, "length": 128},
            "evaluate": [fidelity, latency] if timed else [fidelity],
        }
    )


def speedups(folder: Path, source: Path, threads: int, rounds: int) -> list[Figure]:
    """Time the result of the first job beside the whole model, in each runtime."""
    whole = {name: folder / f"{name}-whole" for name in ("onnx", "openvino")}
    trial, _, _ = save_float_graphs(source, recipe_of({}), threads, folder / "whole", whole["onnx"], whole["openvino"])
    figures = []
    for name, title, exporter in (("onnx", "ONNX Runtime", onnx), ("openvino", "OpenVINO", openvino)):
        forms = {
            "whole": Form(exporter.CONSUMER, whole[name]),
            "smaller": Form(exporter.CONSUMER, folder / "0" / "out" / name),
        }
        timed = time_by_turns(forms, trial, rounds, folder / "scratch" / name)
        for shape in timed.shapes:
            row = f"runtimes/{title}, {shape}"
            figures += [
                Figure(f"{row}/whole", round(timed.median("whole", shape), 2), "ms"),
                Figure(f"{row}/smaller", round(timed.median("smaller", shape), 2), "ms"),
                Figure(f"{row}/faster", round(timed.speedup("smaller", ("whole",), shape), 2), "×"),
            ]
    return figures


if __name__ == "__main__":
    sys.exit(main())
