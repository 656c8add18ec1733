"""all-MiniLM-L6-v2 as dynamic int8, beside itself in fp32: latency, fidelity, size.

    python -m bench.encoder [--threads 2] [--rounds 3]

The pipeline runs the built-in recipe `int8-encoder`. The references are fp32 in eager torch, and the fastest of all fp32 forms, including
the graphs in ONNX Runtime and OpenVINO that a careful user would otherwise use.
"""

import sys
import tempfile
import time
from pathlib import Path

from bench.pressing import Form, form_figures, press, save_float_graphs, time_by_turns, where
from bench.record import Figure, finish, make_parser
from nightpress.core.compress.export import onnx, openvino, safetensors
from nightpress.core.recipes.builtins import get_recipe
from tests.models import minilm_dir

FLOATS = ("torch fp32", "ONNX Runtime fp32", "OpenVINO fp32")


def main() -> int:
    parser = make_parser("encoder", __doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nightpress-bench-") as folder:
        figures = measure(Path(folder), options.threads, options.rounds)
    return finish("encoder", figures, parser, options)


def measure(folder: Path, threads: int, rounds: int) -> list[Figure]:
    job, recipe = folder / "job", get_recipe("int8-encoder")
    started = time.monotonic()
    report = press(job, minilm_dir(folder), recipe, threads)
    seconds = time.monotonic() - started
    source, floats = job / "source", (folder / "onnx-fp32", folder / "openvino-fp32")
    trial, _, _ = save_float_graphs(source, recipe, threads, job / "work", *floats)
    forms = {
        "torch fp32": Form(safetensors.CONSUMER, source),
        "ONNX Runtime fp32": Form(onnx.CONSUMER, floats[0]),
        "OpenVINO fp32": Form(openvino.CONSUMER, floats[1]),
        "ONNX Runtime int8": Form(onnx.CONSUMER, job / "out" / "onnx"),
        "OpenVINO int8": Form(openvino.CONSUMER, job / "out" / "openvino"),
    }
    timed = time_by_turns(forms, trial, rounds, folder / "scratch")
    return [
        Figure(f"job{where()}/seconds", round(seconds, 1), "s"),
        Figure(f"job{where()}/exporting", round(report.phases["exporting"], 1), "s"),
        *form_figures("forms" + where(), forms, timed, FLOATS),
    ]


if __name__ == "__main__":
    sys.exit(main())
