"""all-MiniLM-L6-v2 in static int8, beside fp32 and beside ONNX Runtime's own static quantization with its defaults.

    python -m bench.static_int8 [--model FOLDER] [--threads 2] [--rounds 3]

The pipeline quantizes the model. ONNX Runtime's `quantize_static` gets the same graph, and calibration texts of the same length. Cosines
compare mean-pooled outputs with the source's, over texts that neither has seen. OpenVINO is left out if it is not installed.
"""

import logging
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np

from bench.pressing import Form, form_figures, press, save_float_graphs, time_by_turns, where
from bench.record import Figure, finish, make_parser
from nightpress.core.compress.calibration.samples import calibration_samples
from nightpress.core.compress.export import onnx, openvino, safetensors
from nightpress.core.recipes.models import parse_recipe
from tests.models import minilm_dir

RECIPE = {
    "name": "static-int8",
    "passes": [{"pass": "static-int8"}],
    "exports": ["onnx", "openvino"],
    "calibration": {"samples": 64, "length": 128},
    "evaluate": [
        {"metric": "fidelity", "samples": 64, "length": 128},
        {"metric": "latency", "batch": [1, 8], "length": 128},
    ],
}


def main() -> int:
    parser = make_parser("static_int8", __doc__)
    parser.add_argument("--model", type=Path, help="an embedder's folder; default: all-MiniLM-L6-v2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nightpress-bench-") as folder:
        model = options.model or minilm_dir(Path(folder))
        figures = measure(model, Path(folder), options.threads, options.rounds)
    return finish("static_int8", figures, parser, options)


def measure(model: Path, folder: Path, threads: int, rounds: int) -> list[Figure]:
    has_openvino = find_spec("openvino") is not None
    recipe = parse_recipe(RECIPE | ({} if has_openvino else {"exports": ["onnx"]}))
    job = folder / "job"
    started = time.monotonic()
    report = press(job, model, recipe, threads)
    seconds = time.monotonic() - started
    source, onnx_fp32 = job / "source", folder / "onnx-fp32"
    openvino_fp32 = folder / "openvino-fp32" if has_openvino else None
    trial, traced, context = save_float_graphs(source, recipe, threads, job / "work", onnx_fp32, openvino_fp32)
    naive = copytree(onnx_fp32, folder / "onnx-naive")
    _quantize_naively(traced.path, naive / onnx.GRAPH_FILE, calibration_samples(source, context)["input_ids"].numpy())
    forms = {
        "torch fp32": Form(safetensors.CONSUMER, source),
        "ONNX Runtime fp32": Form(onnx.CONSUMER, onnx_fp32),
        "ONNX Runtime, its own quantize_static": Form(onnx.CONSUMER, naive),
        "ONNX Runtime, static-int8": Form(onnx.CONSUMER, job / "out" / "onnx"),
    }
    if openvino_fp32 is not None:
        forms["OpenVINO fp32"] = Form(openvino.CONSUMER, openvino_fp32)
        forms["OpenVINO, static-int8"] = Form(openvino.CONSUMER, job / "out" / "openvino")
    timed = time_by_turns(forms, trial, rounds, folder / "scratch")
    summary = report.passes[0].summary
    floats = tuple(name for name in forms if name.endswith("fp32"))
    return [
        Figure(f"job{where()}/seconds", round(seconds, 1), "s"),
        Figure(f"pass{where()}/seconds", round(report.passes[0].seconds, 1), "s"),
        Figure(f"pass{where()}/matrices", summary["matrices"], "matrices in int8"),
        Figure(f"pass{where()}/left_in_float", len(summary["left_in_float"]), "matrices"),
        Figure(f"pass{where()}/weight_bits", summary["weight_bits"], "bits"),
        *form_figures("forms" + where(), forms, timed, floats),
    ]


def _quantize_naively(graph_file: Path, target: Path, ids: np.ndarray[Any, Any]) -> None:
    """Quantize with all defaults of ONNX Runtime: all kinds of nodes, ranges by extremes, one scale per tensor. ids: [texts, tokens]."""
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    session = onnxruntime.InferenceSession(graph_file, providers=["CPUExecutionProvider"])
    inputs = {port.name for port in session.get_inputs()}

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._rows = iter(ids)

        def get_next(self) -> dict[str, Any] | None:
            row = next(self._rows, None)
            if row is None:
                return None
            feeds = {"input_ids": row[None], "attention_mask": np.ones_like(row[None])}
            feeds["token_type_ids"] = np.zeros_like(row[None])
            return {name: value for name, value in feeds.items() if name in inputs}

    logging.disable(logging.WARNING)
    quantize_static(graph_file, target, Reader())
    logging.disable(logging.NOTSET)


if __name__ == "__main__":
    sys.exit(main())
