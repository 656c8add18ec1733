"""An ONNX graph with its tokenizer and config, as ONNX Runtime reads it."""

import shutil
import time
from pathlib import Path
from typing import Any

from nightpress.core.compress.export.onnx_codes import write_codes
from nightpress.core.compress.graph.dynamic_int8 import quantize_onnx
from nightpress.core.compress.graph.tracing import Traced
from nightpress.core.compress.grids.pressed_weights import PressedWeights
from nightpress.core.compress.model.checkpoint import disk_errors
from nightpress.core.compress.model.companions import copy_companions
from nightpress.core.handoff.report import PassRecord
from nightpress.core.recipes.passes import DynamicInt8

CONSUMER = Path(__file__).parents[1] / "runners" / "onnxruntime_runner.py"
GRAPH_FILE = "model.onnx"
_FEWEST = 1024  #: weights; smaller constants stay in float32
_LARGEST = 1_900_000_000  #: bytes that protobuf takes in one file


def save(
    model_dir: Path,
    out_dir: Path,
    traced: Traced,
    graph_passes: list[tuple[int, DynamicInt8]],
    *,
    weights: str = "fp32",
) -> tuple[PassRecord, ...]:
    """Write the folder. graph_passes: those passes of the recipe, with their places, that work on the graph.

    weights: `fp32`, or `fp16` to store in half the bytes what no pass has rounded; the arithmetic stays in float32.
    """
    pressed = PressedWeights(model_dir)
    with disk_errors():
        out_dir.mkdir(parents=True)
        copy_companions(model_dir, out_dir)
    target = out_dir / GRAPH_FILE
    records = []
    for index, options in graph_passes:
        start = time.monotonic()
        layers = quantize_onnx(traced.path, target, options, rounding=traced.rounding, peaks=traced.peaks)
        records.append(
            PassRecord(
                index=index,
                name=options.pass_,
                seconds=time.monotonic() - start,
                summary={"format": "onnx", "matrices": len(layers), "per_channel": options.per_channel},
                layers=layers,
            )
        )
    if graph_passes and weights == "fp32":
        return tuple(records)
    with disk_errors():
        if not graph_passes and not pressed.packed and weights == "fp32":
            for file in traced.path.parent.glob(f"{GRAPH_FILE}*"):
                shutil.copyfile(file, out_dir / file.name)
            return ()
        import onnx

        model = onnx.load(target if graph_passes else traced.path)
        if pressed.packed:
            write_codes(model, pressed)
        if weights == "fp16":
            _halve(onnx, model)
        large = sum(len(one.raw_data) for one in model.graph.initializer) > _LARGEST
        onnx.save(model, target, save_as_external_data=large, location=f"{GRAPH_FILE}.data")
    return tuple(records)


def _halve(onnx: Any, model: Any) -> None:
    """Store large float constants as float16, each before a Cast that the runtime folds away as it loads them."""
    import numpy as np

    casts = []
    for one in model.graph.initializer:
        if one.data_type != onnx.TensorProto.FLOAT:
            continue
        values = onnx.numpy_helper.to_array(one)
        if values.size < _FEWEST or np.abs(values).max() > np.finfo(np.float16).max:
            continue
        name = one.name
        one.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), f"{name}_fp16"))
        casts.append(onnx.helper.make_node("Cast", [one.name], [name], f"{name}_cast", to=onnx.TensorProto.FLOAT))
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(casts + nodes)
