"""An ONNX graph with its tokenizer and config, as ONNX Runtime reads it.

An encoder-decoder is two files, encoder_model.onnx and decoder_model_merged.onnx: the names that optimum and transformers.js look for.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from nightpress.core.compress.export.onnx_codes import write_codes
from nightpress.core.compress.graph.lists import replace_all
from nightpress.core.compress.graph.tracing import Traced
from nightpress.core.compress.grids.pressed_weights import PressedWeights
from nightpress.core.compress.model.checkpoint import disk_errors
from nightpress.core.compress.model.companions import copy_companions
from nightpress.core.compress.passes.registry import Records, RuntimePasses, runtime_pass_of, together
from nightpress.core.handoff.report import PassRecord

CONSUMER = Path(__file__).parents[1] / "runners" / "onnxruntime_runner.py"
GRAPH_FILE = "model.onnx"
_FEWEST = 1024  #: weights; smaller constants stay in float32
_LARGEST = 1_900_000_000  #: bytes of weights that are stored inside the graph's file; protobuf's limit is 2 GiB


def save(model_dir: Path, out_dir: Path, traced: Traced, passes: RuntimePasses, weights: str = "fp32") -> Records:
    """Write the folder. passes: the passes of the stage `runtime`, with their indices in the recipe.

    weights: `fp32`, or `fp16` to store the weights that no pass has rounded in half the bytes. The arithmetic stays in float32.
    """
    pressed = PressedWeights(model_dir)
    copy_companions(model_dir, out_dir)
    records: list[PassRecord] = []
    for name, graph in traced.graphs.items():
        target, alone = out_dir / f"{name}.onnx", replace(traced, path=graph, encoder=None)
        done = [runtime_pass_of(options, "onnx")(alone, target, options, index=index) for index, options in passes]
        records = together(records, done)
        codes = pressed if pressed.packed and not (done and weights == "fp32") else None
        with disk_errors():
            if not done and codes is None and weights == "fp32":
                for file in graph.parent.glob(f"{graph.name}.*"):  # weights beyond 2 GiB
                    shutil.copyfile(file, out_dir / file.name)
            _write(target if done else graph, target, codes, halve=weights == "fp16")
    return tuple(records)


def _write(graph: Path, target: Path, codes: PressedWeights | None, *, halve: bool) -> None:
    """Write a graph without the shapes of what is computed inside. codes: of packed weights, which replace the floats.

    By these shapes, ONNX Runtime would join each sum of a residual with the norm behind it into a SkipLayerNormalization. On the processor
    it takes several times as long as both: see decision 0204.
    """
    import onnx

    changed = codes is not None or halve
    model = onnx.load(graph, load_external_data=changed)
    del model.graph.value_info[:]
    if codes is not None:
        write_codes(model, codes)
    if halve:
        _halve(onnx, model)
    large = changed and sum(len(initializer.raw_data) for initializer in model.graph.initializer) > _LARGEST
    onnx.save(model, target, save_as_external_data=large, location=f"{target.name}.data")


def _halve(onnx: Any, model: Any) -> None:
    """Store large float constants as float16, each with a Cast that the runtime removes when it loads the graph."""
    import numpy as np

    casts = []
    for initializer in model.graph.initializer:
        if initializer.data_type != onnx.TensorProto.FLOAT:
            continue
        values = onnx.numpy_helper.to_array(initializer)
        if values.size < _FEWEST or np.abs(values).max() > np.finfo(np.float16).max:
            continue
        name = initializer.name
        initializer.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), f"{name}_fp16"))
        casts.append(
            onnx.helper.make_node("Cast", [initializer.name], [name], f"{name}_cast", to=onnx.TensorProto.FLOAT)
        )
    replace_all(model.graph.node, [*casts, *model.graph.node])
