"""Traces a tiny model into a graph in dynamic int8, runs it, and compares it with the model."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nightpress.core.compress.data.tokenized import Sequences
from nightpress.core.compress.export import onnx, openvino
from nightpress.core.compress.graph.tracing import trace
from nightpress.core.compress.passes import PassContext
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.passes import PassOptions


def graph_distance(format_: str, header: ModelHeader, source: Path, work: Path, options: PassOptions) -> float:
    """Return the relative distance of the graph's outputs from the model's, for two texts."""
    ids = np.random.default_rng(1).integers(5, 50, (2, 24))
    (work / "work").mkdir(parents=True)
    context = PassContext(header=header, work_dir=work / "work")
    traced = trace(source, header, Sequences(ids, np.ones_like(ids)), context)
    exporter: Any = onnx if format_ == "onnx" else openvino
    exporter.save(source, work / "out", traced, [(0, options)], weights="fp32")
    found = (_in_onnxruntime if format_ == "onnx" else _in_openvino)(work / "out", ids)
    return float(np.linalg.norm(found - traced.check) / np.linalg.norm(traced.check))


def _feeds(ids: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    return {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.zeros_like(ids),
        "position_ids": np.tile(np.arange(ids.shape[1]), (len(ids), 1)),
        "beam_idx": np.arange(len(ids), dtype=np.int32),
    }


def _in_onnxruntime(folder: Path, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    given: dict[str, Any] = {}
    for value in session.get_inputs():
        known = _feeds(ids).get(value.name)
        given[value.name] = (
            np.zeros((len(ids), value.shape[1], 0, value.shape[3]), np.float32) if known is None else known
        )
    out: NDArray[np.float32] = session.run(None, given)[0]
    return out


def _in_openvino(folder: Path, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    import openvino as runtime

    model = runtime.Core().compile_model(str(folder / "openvino_model.xml"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    names = {name for port in model.inputs for name in port.names}
    request = model.create_infer_request()
    out: NDArray[np.float32] = request.infer({name: value for name, value in _feeds(ids).items() if name in names})[0]
    return out
